"""Paged attention for Hopper in Mosaic GPU: the supported arguments, and the choice between two kernels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas.backends import mosaic_unsupported_reason
from kernels_pallas.gpu.export_cache import exported_once
from kernels_pallas.gpu.mosaic import WARPGROUP_ROWS
from kernels_pallas.paged_attention.gpu_decode import decode
from kernels_pallas.paged_attention.gpu_prefill import prefill

HEADS, KEY_HEADS, WIDTH = 8, 2, 256  # shared memory and registers fit these


def unsupported_reason(q: jax.Array, keys: jax.Array) -> str | None:
    """Returns why the kernels do not serve these arguments, or None if they do."""
    _, N, H = q.shape
    if H != WIDTH:
        return f"q has heads of {H}, and it takes {WIDTH}"
    if (N, keys.shape[2] // H) != (HEADS, KEY_HEADS):
        return f"there are {N} query and {keys.shape[2] // H} key-value heads, and it takes {HEADS} and {KEY_HEADS}"
    if q.dtype != jnp.bfloat16 or keys.dtype != q.dtype:
        return f"q is {q.dtype} and keys {keys.dtype}, and it takes bfloat16 for both"
    return mosaic_unsupported_reason()


@exported_once
def paged_attention(
    q: Float[Array, "T N H"],
    keys: Float[Array, "P page KH"],
    values: Float[Array, "P page KH"],
    block_tables: Int32[Array, "S M"],
    query_starts: Int32[Array, " S"],
    query_lens: Int32[Array, " S"],
    context_lens: Int32[Array, " S"],
    max_query_len: int,
) -> Float[Array, "T N H"]:
    """Computes `api.paged_attention`."""
    run = decode if max_query_len * q.shape[1] <= WARPGROUP_ROWS else prefill
    return run(q, keys, values, block_tables, query_starts, query_lens, context_lens, max_query_len)
