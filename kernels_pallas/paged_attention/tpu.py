"""Paged attention on TPU: the supported arguments, and their layout for the kernel.

Glossary: C blocks of queries, L queries of a block, G query heads of a key-value head; the others as in the
api.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas.paged_attention import tpu_kernel
from kernels_pallas.paged_attention.reference import query_blocks, token_rows
from kernels_pallas.tpu.stream import LANES

DTYPES = ("float32", "bfloat16")


def unsupported_reason(q: Float[Array, "T N H"], keys: Float[Array, "P page KH"]) -> str | None:
    """Returns why the kernel does not serve these arguments, or None if it does."""
    if q.shape[2] % LANES:
        return f"q's heads are {q.shape[2]} wide, and it takes multiples of {LANES}"
    if str(q.dtype) not in DTYPES or keys.dtype != q.dtype:
        return f"q is {q.dtype} and keys {keys.dtype}, and it takes {' or '.join(DTYPES)} for both"
    return None


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
    (T, N, H), K = q.shape, keys.shape[2] // q.shape[2]
    tiling = tpu_kernel.query_tiling(N, K, max_query_len, q.dtype)
    blocks = query_blocks(query_starts, query_lens, context_lens, T, tiling.queries)
    C, L = blocks.rows.shape
    groups = 1 if tiling.joint else K
    q_CLKGH = q[jnp.clip(blocks.rows, 0, T - 1)].reshape(C, L, groups, N // groups, H)
    q_CKRH = q_CLKGH.swapaxes(1, 2).reshape(C, groups, -1, H)
    out_CKRH = tpu_kernel.forward(q_CKRH, keys, values, block_tables, blocks, tiling)
    out_RNH = out_CKRH.reshape(-1, groups, L, N // groups, H).swapaxes(1, 2).reshape(-1, N, H)
    row_T, real_T = token_rows(query_starts, query_lens, T, L)
    return jnp.where(real_T[:, None, None], out_RNH[row_T], jnp.zeros((), q.dtype))
