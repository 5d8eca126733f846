"""Causal attention for Hopper in Mosaic GPU: the supported arguments, and the custom gradient.

All rows are one to the kernels: each token has the begin and end of its sequence.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from kernels_pallas.backends import mosaic_unsupported_reason
from kernels_pallas.causal_attention.gpu_backward import backward
from kernels_pallas.causal_attention.gpu_forward import forward
from kernels_pallas.remat import SAVE_NAME

WIDTH = 256  # of a head
ALIGNED = 8  # rows of a memory tile


def unsupported_reason(q: jax.Array, k: jax.Array) -> str | None:
    """Returns why the kernels do not serve these arguments, or None if they do."""
    R, T, _, H = q.shape
    if H != WIDTH:
        return f"q has heads of {H}, and it takes {WIDTH}"
    if R * T % ALIGNED:
        return f"q has {R} x {T} tokens, and it takes a multiple of {ALIGNED}"
    if q.dtype != jnp.bfloat16 or k.dtype != jnp.bfloat16:
        return f"q is {q.dtype} and k {k.dtype}, and it takes bfloat16 for both"
    return mosaic_unsupported_reason()


def causal_attention(
    q: Float[Array, "R T N H"], k: Float[Array, "R T K H"], v: Float[Array, "R T K H"], segments: Int32[Array, "R T"]
) -> Float[Array, "R T N H"]:
    """Computes `api.causal_attention`."""
    flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return _attend(*flat, *_sequences(segments)).reshape(q.shape)


def _sequences(segments: Int32[Array, "R T"]) -> tuple[Int32[Array, " RT"], Int32[Array, " RT"]]:
    """Returns begin and end of each token's sequence, counted from the first row's first token."""
    R, T = segments.shape
    edge = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True).reshape(-1)
    token = jnp.arange(R * T, dtype=jnp.int32)
    begin = jax.lax.cummax(jnp.where(edge, token, 0))
    after = jnp.pad(jnp.where(edge, token, R * T)[1:], (0, 1), constant_values=R * T)
    return begin, jax.lax.cummin(after, reverse=True)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, begin: Array, end: Array) -> Array:
    return _remember(q, k, v, begin, end)[0]


def _remember(q: Array, k: Array, v: Array, begin: Array, end: Array) -> tuple[Array, Any]:
    out, sums = (checkpoint_name(x, SAVE_NAME) for x in forward(q, k, v, begin))
    return out, (q, k, v, out, sums, begin, end)


def _pull_back(residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    q, k, v, out, sums, begin, end = residuals
    return *backward(q, k, v, out, sums, cotangent, begin, end), None, None


_attend.defvjp(_remember, _pull_back)
