"""Cross entropy over a large vocabulary whose logits never stand whole.

The tokens are taken in chunks, and a chunk's gradient is computed right behind its logits, before anybody has asked for it: the
loss is one number, so its cotangent is a factor on gradients that are there already. That makes 3 products of T x D x V, and no
logits kept: 32,768 tokens would have 32 GB of them in float32. Not differentiated, it is one product.
Glossary: T tokens, D width, V vocabulary, t tokens of a chunk, v the vocabulary in whole tiles.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from minicpmv46_jax.model.layers import matmul_precision

CHUNK_LOGITS = 2**30  # logits of a chunk at once, about at most: 4 GiB in float32; every chunk adds to the whole table's gradient
LANES = 128  # the table is filled up to whole tiles: rows of logits begin at 16 bytes then, and 248,094 is no multiple of 8


def summed_loss(
    hidden: Float[Array, "T D"],
    table: Float[Array, "V D"],
    labels: Int32[Array, " T"],
    weights: Float32[Array, " T"],
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[Float32[Array, ""], Float32[Array, " T"], Float32[Array, " T"]]:
    """The sum of weights x (negative log likelihood + z_loss x squared log-sum-exp), and both of them for each token.

    Only the sum has a gradient, and only with respect to `hidden` and `table`.

    Args:
      hidden: the last hidden states, normalised.
      table: the tied embedding table, in the same dtype.
      labels: 0 to V - 1; where nothing is asked, anything in this range.
      weights: how much each token counts.
      z_loss: arXiv:2204.02311, section 5.
      chunk: tokens at once, about; None for as many as `CHUNK_LOGITS` allow.
    """
    T, V = hidden.shape[0], table.shape[0]
    chunks = -(-T // chunk) if chunk else max(round(T * V / CHUNK_LOGITS), 1)
    total, nll, lse = _summed(hidden, table, labels, weights, z_loss, min(chunks, T))
    return total, jax.lax.stop_gradient(nll), jax.lax.stop_gradient(lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed(hidden: Array, table: Array, labels: Array, weights: Array, z_loss: float, chunks: int) -> tuple[Array, Array, Array]:
    tiles = _whole_tiles(table)
    nll, lse = jax.lax.map(lambda part: _chunk(part[0], tiles, part[1], table.shape[0])[1:], _split(chunks, hidden, labels))
    return _sum(nll, lse, weights, z_loss)


def _forward(
    hidden: Array, table: Array, labels: Array, weights: Array, z_loss: float, chunks: int
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    tiles = _whole_tiles(table)

    def add(tiles_bar, part):
        h, label, weight = part
        logits, nll, lse = _chunk(h, tiles, label, table.shape[0])
        softmax = jnp.exp(logits - lse[:, None]) * (weight * (1.0 + 2.0 * z_loss * lse))[:, None]
        logits_bar = (softmax - jnp.where(_own(logits, label), weight[:, None], 0.0)).astype(h.dtype)
        h_bar = _dot("tv,vd->td", logits_bar, tiles).astype(h.dtype)
        return tiles_bar + _dot("tv,td->vd", logits_bar, h), (nll, lse, h_bar)

    zeros = jnp.zeros(tiles.shape, jnp.float32)
    tiles_bar, (nll, lse, h_bar) = jax.lax.scan(add, zeros, _split(chunks, hidden, labels, weights))
    bars = h_bar.reshape(-1, h_bar.shape[-1])[: hidden.shape[0]], tiles_bar[: table.shape[0]]
    return _sum(nll, lse, weights, z_loss), bars


def _backward(z_loss: float, chunks: int, bars: tuple[Array, Array], cotangents: tuple[Array, Array, Array]) -> tuple:
    hidden_bar, table_bar = ((bar.astype(jnp.float32) * cotangents[0]).astype(bars[0].dtype) for bar in bars)
    return hidden_bar, table_bar, None, None


_summed.defvjp(_forward, _backward)


def _split(chunks: int, *of_tokens: Array) -> tuple[Array, ...]:
    """In equal chunks, [chunks, t, ...]; the last is filled up with tokens that weigh nothing."""
    size = math.ceil(of_tokens[0].shape[0] / chunks)

    def split(x: Array) -> Array:
        short = chunks * size - x.shape[0]
        x = jnp.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1)) if short else x
        return x.reshape(chunks, size, *x.shape[1:])

    return tuple(map(split, of_tokens))


def _whole_tiles(table: Float[Array, "V D"]) -> Float[Array, "v D"]:
    return jnp.pad(table, ((0, -table.shape[0] % LANES), (0, 0)))


def _chunk(
    hidden: Float[Array, "t D"], tiles: Float[Array, "v D"], labels: Int32[Array, " t"], V: int
) -> tuple[Float32[Array, "t v"], Float32[Array, " t"], Float32[Array, " t"]]:
    """Logits, -inf beyond the vocabulary; negative log likelihoods, log-sum-exps."""
    logits = _dot("td,vd->tv", hidden, tiles)
    logits = jnp.where(jnp.arange(logits.shape[1])[None] < V, logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=1)
    return logits, lse - jnp.where(_own(logits, labels), logits, 0.0).sum(axis=1), lse


def _own(logits: Float32[Array, "t v"], labels: Int32[Array, " t"]) -> Array:
    return jnp.arange(logits.shape[1], dtype=jnp.int32)[None] == labels[:, None]


def _sum(nll: Array, lse: Array, weights: Array, z_loss: float) -> tuple[Array, Array, Array]:
    nll, lse = (x.reshape(-1)[: weights.shape[0]] for x in (nll, lse))
    return (weights * (nll + z_loss * lse**2)).sum(), nll, lse


def _dot(equation: str, x: Array, y: Array) -> Float32[Array, "..."]:
    return jnp.einsum(equation, x, y, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
