"""Packed attention for Hopper in Mosaic GPU: the supported arguments, and the custom gradient."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from kernels_pallas.backends import mosaic_unsupported_reason
from kernels_pallas.gpu.tile_ranges import views, windows
from kernels_pallas.packed_attention.gpu_backward import backward
from kernels_pallas.packed_attention.gpu_forward import forward
from kernels_pallas.remat import SAVE_NAME

WIDTH = 72  # of a head
ALIGNED = 8  # rows of a memory tile


def unsupported_reason(q: jax.Array) -> str | None:
    """Returns why the kernels do not serve these arguments, or None if they do."""
    _, N, H = q.shape
    if H != WIDTH:
        return f"q has heads of {H}, and it takes {WIDTH}"
    if N % 2:
        return f"q has {N} heads, and it takes an even number"
    if q.dtype != jnp.bfloat16:
        return f"q is {q.dtype}, and it takes bfloat16"
    return mosaic_unsupported_reason()


def packed_attention(
    q: Float[Array, "P N H"],
    k: Float[Array, "P N H"],
    v: Float[Array, "P N H"],
    starts: Int32[Array, " I"],
    lengths: Int32[Array, " I"],
    longest: int,
) -> Float[Array, "P N H"]:
    """Computes `api.packed_attention`."""
    del longest  # the kernels serve views of any length
    return _whole_tiles(q, k, v, *views(starts, lengths, q.shape[0]))


def window_attention(
    q: Float[Array, "P N H"], k: Float[Array, "P N H"], v: Float[Array, "P N H"], window: int
) -> Float[Array, "P N H"]:
    """Computes `api.window_attention`."""
    return _whole_tiles(q, k, v, *windows(window, q.shape[0]))


def _whole_tiles(q: Array, k: Array, v: Array, first: Array, end: Array) -> Array:
    """Attends with rows padded to a multiple of 8."""
    P = q.shape[0]
    if short := -P % ALIGNED:
        q, k, v = (jnp.pad(x, ((0, short), (0, 0), (0, 0))) for x in (q, k, v))
        first, end = (jnp.pad(x, (0, short)) for x in (first, end))
    return _attend(q, k, v, first, end)[:P]


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, first: Array, end: Array) -> Array:
    return forward(q, k, v, first, end)[0]


def _remember(q: Array, k: Array, v: Array, first: Array, end: Array) -> tuple[Array, Any]:
    out, sums = (checkpoint_name(x, SAVE_NAME) for x in forward(q, k, v, first, end))
    return out, (q, k, v, out, sums, first, end)


def _pull_back(residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    q, k, v, out, sums, first, end = residuals
    return *backward(q, k, v, out, sums, cotangent, first, end), None, None


_attend.defvjp(_remember, _pull_back)
