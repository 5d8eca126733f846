"""Causal attention in plain XLA, one block of queries after another.

The backward pass recomputes each block, so no T x T scores are in memory.
Glossary as in the api; G query heads of a key-value head, B queries of a block, S keys.
"""

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Int32

BLOCK = 512  # queries scored at once
SPANS = 8  # spans of a row; a span's queries multiply the keys up to its end, which wastes 1/16 of the products


def causal_attention(
    q: Float[Array, "R T N H"], k: Float[Array, "R T K H"], v: Float[Array, "R T K H"], segments: Int32[Array, "R T"]
) -> Float[Array, "R T N H"]:
    """Computes `api.causal_attention`."""
    (R, T, N, H), K = q.shape, k.shape[2]
    span = -(-T // SPANS // BLOCK) * BLOCK
    q = q.reshape(R, T, K, N // K, H)
    out = [_attend_span(q, k, v, segments, start, min(start + span, T)) for start in range(0, T, span)]
    return jnp.concatenate(out, axis=1).reshape(R, T, N, H)


def _attend_span(
    q: Float[Array, "R T K G H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    segments: Int32[Array, "R T"],
    start: int,
    end: int,
) -> Float[Array, "R S K G H"]:
    """Attends the queries from `start` to `end` to the keys up to `end`."""
    size = next(size for size in range(min(BLOCK, end - start), 0, -1) if (end - start) % size == 0)
    keys, values, key_segments = k[:, :end], v[:, :end], segments[:, :end]

    @jax.checkpoint
    def attend(block: tuple[Array, Array, Array]) -> Float[Array, "R B K G H"]:
        queries, query_segments, positions = block
        visible = query_segments[:, :, None] == key_segments[:, None]
        visible &= (jnp.arange(end, dtype=jnp.int32)[None] <= positions[:, None])[None]
        return _attend(queries, keys, values, visible)

    blocks = (x[:, start:end].reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1) for x in (q, segments))
    out = jax.lax.map(attend, (*blocks, jnp.arange(start, end, dtype=jnp.int32).reshape(-1, size)))
    return out.swapaxes(0, 1).reshape(q.shape[0], end - start, *q.shape[2:])


def _attend(q: Float[Array, "R B K G H"], k: Float[Array, "R S K H"], v: Float[Array, "R S K H"], visible: Array) -> Array:
    """Attends each query to its visible keys, at least one."""
    precision = Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("rtkgh,rskh->rkgts", q, k, precision=precision, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("rkgts,rskh->rtkgh", weights, v, precision=precision)
