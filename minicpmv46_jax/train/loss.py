"""Cross entropy over a large vocabulary without ever holding all logits.

Tokens are processed in chunks. The forward pass computes a chunk's gradient directly after its logits. The
loss is one number, so the backward pass only scales these gradients by its cotangent. This takes 3 products
of T x D x V and keeps no logits: 32,768 tokens would need 32 GB for them in float32. Without differentiation
it is one product.
Glossary: T tokens, D width, V vocabulary, t tokens of a chunk, v the vocabulary padded to whole tiles; d_x
  gradient of x.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from minicpmv46_jax.model.layers import matmul_precision

CHUNK_LOGITS = 2**30  # about the most logits of a chunk, 4 GiB in float32; each chunk passes once over the table's gradient
LANES = 128  # the table is padded to whole tiles, so that rows of logits are aligned to 16 bytes


def summed_loss(
    hidden: Float[Array, "T D"],
    table: Float[Array, "V D"],
    labels: Int32[Array, " T"],
    weights: Float32[Array, " T"],
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[Float32[Array, ""], Float32[Array, " T"], Float32[Array, " T"]]:
    """Computes the sum of weights x (negative log likelihood + z_loss x squared log-sum-exp).

    Args:
      hidden: the last hidden states after the final norm.
      table: the tied embedding table, in the same dtype.
      labels: 0 to V - 1, also for tokens of weight 0.
      weights: each token's weight.
      z_loss: weight of the squared log-sum-exp (arXiv:2204.02311, section 5).
      chunk: approximate number of tokens of a chunk; None for as many as `CHUNK_LOGITS` allows.

    Returns:
      (the sum, each token's negative log likelihood, each token's log-sum-exp). Only the sum has a gradient,
      with respect to `hidden` and `table`.
    """
    T, V = hidden.shape[0], table.shape[0]
    chunks = -(-T // chunk) if chunk else max(round(T * V / CHUNK_LOGITS), 1)
    # functools.partial hides the type that custom_vjp returns.
    total, nll, lse = _summed(hidden, table, labels, weights, z_loss, min(chunks, T))  # pyright: ignore[reportGeneralTypeIssues]
    return total, jax.lax.stop_gradient(nll), jax.lax.stop_gradient(lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed(hidden: Array, table: Array, labels: Array, weights: Array, z_loss: float, chunks: int) -> tuple[Array, Array, Array]:
    tiles = _pad_to_tiles(table)
    nll, lse = jax.lax.map(
        lambda part: _chunk_losses(part[0], tiles, part[1], table.shape[0])[1:], _split_chunks(chunks, hidden, labels)
    )
    return _totals(nll, lse, weights, z_loss)


def _forward(
    hidden: Array, table: Array, labels: Array, weights: Array, z_loss: float, chunks: int
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    tiles = _pad_to_tiles(table)

    def add(d_tiles, part):
        h, label, weight = part
        logits, nll, lse = _chunk_losses(h, tiles, label, table.shape[0])
        softmax = jnp.exp(logits - lse[:, None]) * (weight * (1.0 + 2.0 * z_loss * lse))[:, None]
        d_logits = (softmax - jnp.where(_is_label(logits, label), weight[:, None], 0.0)).astype(h.dtype)
        d_h = _dot("tv,vd->td", d_logits, tiles).astype(h.dtype)
        return d_tiles + _dot("tv,td->vd", d_logits, h), (nll, lse, d_h)

    zeros = jnp.zeros(tiles.shape, jnp.float32)
    d_tiles, (nll, lse, d_h) = jax.lax.scan(add, zeros, _split_chunks(chunks, hidden, labels, weights))
    gradients = d_h.reshape(-1, d_h.shape[-1])[: hidden.shape[0]], d_tiles[: table.shape[0]]
    return _totals(nll, lse, weights, z_loss), gradients


def _backward(z_loss: float, chunks: int, gradients: tuple[Array, Array], cotangents: tuple[Array, Array, Array]) -> tuple:
    dtype = gradients[0].dtype
    d_hidden, d_table = ((gradient.astype(jnp.float32) * cotangents[0]).astype(dtype) for gradient in gradients)
    return d_hidden, d_table, None, None


_summed.defvjp(_forward, _backward)


def _split_chunks(chunks: int, *arrays: Array) -> tuple[Array, ...]:
    """Splits arrays into equal chunks [chunks, t, ...]; the last chunk is padded with tokens of weight 0."""
    size = math.ceil(arrays[0].shape[0] / chunks)

    def split(x: Array) -> Array:
        padding = chunks * size - x.shape[0]
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) if padding else x
        return x.reshape(chunks, size, *x.shape[1:])

    return tuple(map(split, arrays))


def _pad_to_tiles(table: Float[Array, "V D"]) -> Float[Array, "v D"]:
    return jnp.pad(table, ((0, -table.shape[0] % LANES), (0, 0)))


def _chunk_losses(
    hidden: Float[Array, "t D"], tiles: Float[Array, "v D"], labels: Int32[Array, " t"], V: int
) -> tuple[Float32[Array, "t v"], Float32[Array, " t"], Float32[Array, " t"]]:
    """Returns (logits, -inf beyond the vocabulary; negative log likelihoods; log-sum-exps) of a chunk."""
    logits = _dot("td,vd->tv", hidden, tiles)
    logits = jnp.where(jnp.arange(logits.shape[1])[None] < V, logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=1)
    return logits, lse - jnp.where(_is_label(logits, labels), logits, 0.0).sum(axis=1), lse


def _is_label(logits: Float32[Array, "t v"], labels: Int32[Array, " t"]) -> Array:
    return jnp.arange(logits.shape[1], dtype=jnp.int32)[None] == labels[:, None]


def _totals(nll: Array, lse: Array, weights: Array, z_loss: float) -> tuple[Array, Array, Array]:
    nll, lse = (x.reshape(-1)[: weights.shape[0]] for x in (nll, lse))
    return (weights * (nll + z_loss * lse**2)).sum(), nll, lse


def _dot(equation: str, x: Array, y: Array) -> Float32[Array, "..."]:
    return jnp.einsum(equation, x, y, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
