"""Cross entropy over a large vocabulary whose logits never stand whole.

The vocabulary is taken in chunks, forward (a running log-sum-exp) and backward (each chunk's logits once more, its gradient of
the table written once): 4 products of T x D x V where whole logits would take 3, and T x 248,094 float32 less of memory, 32 GB
for 32,768 tokens. Chunks of tokens instead would add up a gradient of the whole table, 1 GB in float32, for every chunk.
Glossary: T tokens, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from minicpmv46_jax.layers import precise

CHUNK_LOGITS = 2**28  # logits of a chunk at once, at most: 1 GiB in float32


def token_losses(
    hidden: Float[Array, "T D"], table: Float[Array, "V D"], labels: Int32[Array, " T"], chunk: int | None = None
) -> tuple[Float32[Array, " T"], Float32[Array, " T"]]:
    """Each token's negative log likelihood of its label, and its log-sum-exp (for the z-loss).

    Args:
      hidden: the last hidden states, normalised.
      table: the tied embedding table, in the same dtype.
      labels: 0 to V - 1; where nothing is asked, anything in this range.
      chunk: entries of the vocabulary at once; None for as many as `CHUNK_LOGITS` allow.
    """
    size = min(table.shape[0], chunk or max(CHUNK_LOGITS // hidden.shape[0], 1))
    return _token_losses(hidden, table, labels, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_losses(hidden: Array, table: Array, labels: Array, size: int) -> tuple[Array, Array]:
    def add(carry, first):
        top, total, own = carry
        logits, at = _chunk_logits(hidden, table, first, size)
        new_top = jnp.maximum(top, logits.max(axis=1))
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(axis=1)
        own += jnp.where(at[None] == labels[:, None], logits, 0.0).sum(axis=1)
        return (new_top, total, own), None

    zeros = jnp.zeros(labels.shape)
    (top, total, own), _ = jax.lax.scan(add, (zeros - jnp.inf, zeros, zeros), _firsts(table, size))
    lse = top + jnp.log(total)
    return lse - own, lse


def _forward(hidden: Array, table: Array, labels: Array, size: int) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    losses, lse = _token_losses(hidden, table, labels, size)
    return (losses, lse), (hidden, table, labels, lse)


def _backward(size: int, kept: tuple[Array, ...], bars: tuple[Array, Array]) -> tuple[Array, Array, None]:
    hidden, table, labels, lse = kept
    loss_bar, lse_bar = bars

    def add(carry, first):
        hidden_bar, table_bar = carry
        logits, at = _chunk_logits(hidden, table, first, size)
        softmax = jnp.exp(logits - lse[:, None]) * (loss_bar + lse_bar)[:, None]
        logits_bar = (softmax - jnp.where(at[None] == labels[:, None], loss_bar[:, None], 0.0)).astype(hidden.dtype)
        part, start = _chunk(table, first, size)
        hidden_bar += _dot("tv,vd->td", logits_bar, part)
        new = jax.lax.dynamic_slice_in_dim(table_bar, start, size) + _dot("tv,td->vd", logits_bar, hidden).astype(table.dtype)
        return (hidden_bar, jax.lax.dynamic_update_slice_in_dim(table_bar, new, start, 0)), None

    zeros = jnp.zeros_like(hidden, jnp.float32), jnp.zeros_like(table)
    (hidden_bar, table_bar), _ = jax.lax.scan(add, zeros, _firsts(table, size))
    return hidden_bar.astype(hidden.dtype), table_bar, None


_token_losses.defvjp(_forward, _backward)


def _chunk_logits(hidden: Array, table: Array, first: Array, size: int) -> tuple[Float32[Array, "T v"], Int32[Array, " v"]]:
    """The chunk's logits and which entries they are; -inf and -1 for entries that an earlier chunk had."""
    part, start = _chunk(table, first, size)
    at = start + jnp.arange(size, dtype=jnp.int32)
    own = at >= first
    return jnp.where(own[None], _dot("td,vd->tv", hidden, part), -jnp.inf), jnp.where(own, at, -1)


def _chunk(table: Array, first: Array, size: int) -> tuple[Float[Array, "v D"], Int32[Array, ""]]:
    """Entries of the table from `first` on; the last chunk begins earlier, so that it is as large as the others."""
    start = jnp.minimum(first, table.shape[0] - size)
    return jax.lax.dynamic_slice_in_dim(table, start, size), start


def _firsts(table: Array, size: int) -> Int32[Array, " chunks"]:
    return jnp.arange(0, table.shape[0], size, dtype=jnp.int32)


def _dot(equation: str, x: Array, y: Array) -> Float32[Array, "..."]:
    return jnp.einsum(equation, x, y, precision=precise(x.dtype), preferred_element_type=jnp.float32)
