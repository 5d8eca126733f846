"""The Hopper kernels in Mosaic GPU: supported arguments, and the gradient of the chunked form."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.backends import mosaic_unsupported_reason
from kernels_pallas.gated_delta.arguments import ChunkedArguments
from kernels_pallas.gated_delta.gpu_backward import backward
from kernels_pallas.gated_delta.gpu_chunked import CONV_HISTORY, forward
from kernels_pallas.gated_delta.gpu_recurrent import recurrent
from kernels_pallas.gpu.export_cache import exported_once

__all__ = ["chunked", "recurrent", "unsupported_reason"]

WIDTH = 128  # of keys and of values


def unsupported_reason(qkv: jax.Array, conv: jax.Array, recurrent_state: jax.Array) -> str | None:
    """Returns why the kernels do not support these arguments, or None."""
    _, N, V, K = recurrent_state.shape
    if (K, V) != (WIDTH, WIDTH):
        return f"recurrent_state has heads of {V} values and {K} keys, and it takes {WIDTH} and {WIDTH}"
    if qkv.shape[-1] != 3 * N * WIDTH:
        return f"qkv has {qkv.shape[-1]} channels, and it takes {3 * N * WIDTH}: as many key heads as value heads"
    if conv.shape[1] != CONV_HISTORY + 1:
        return f"layer.conv has {conv.shape[1]} taps, and it takes {CONV_HISTORY + 1}"
    if qkv.dtype != jnp.bfloat16:
        return f"qkv is {qkv.dtype}, and it takes bfloat16"
    return mosaic_unsupported_reason()


@exported_once
def chunked(arguments: ChunkedArguments) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `reference.chunked`."""
    return _chunked(arguments)


@jax.custom_vjp
def _chunked(arguments: ChunkedArguments) -> tuple[jax.Array, jax.Array, jax.Array]:
    return forward(arguments, save_residuals=False)[0]


def _chunked_fwd(arguments: ChunkedArguments) -> tuple[Any, Any]:
    results, saved = forward(arguments, save_residuals=True)
    return results, (arguments, saved)


def _chunked_bwd(residuals: Any, cotangents: Any) -> tuple[ChunkedArguments]:
    return (backward(*residuals, *cotangents),)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
