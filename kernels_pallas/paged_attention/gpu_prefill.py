"""Paged attention for Hopper with many queries per sequence: bound by the matrix unit.

A block has 32 queries of a sequence with the heads of one key-value head: 128 rows, half for each of two
warpgroups. The two visit the pages together and take turns at the matrix unit: while one computes scores, the
other computes its softmax. A third warpgroup only fetches. If there are fewer blocks than SMs, each is split
along the pages, and XLA combines the parts.
Glossary: T queries, S sequences, N query heads, K key-value heads, G query heads of each, H head width, C
blocks of L queries.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from kernels_pallas.gpu.mosaic import (
    MATRIX,
    NEG_INF,
    ROW,
    TRANSPOSE,
    WARPGROUP_ROWS,
    accumulate,
    along_rows,
    barrier_sync,
    empty_softmax,
    finish_softmax,
    iota,
    num_sms,
    online_softmax,
    params,
    store,
    tiles,
)
from kernels_pallas.page_size import PAGE
from kernels_pallas.paged_attention.gpu_decode import zero_rows
from kernels_pallas.paged_attention.reference import query_blocks, token_rows

GROUPS = 2  # warpgroups that compute
STAGES = 2  # buffers of keys, and of values; three do not fit


def prefill(
    q: Float[Array, "T N H"],
    keys: Float[Array, "P page KH"],
    values: Float[Array, "P page KH"],
    block_tables: Int32[Array, "S M"],
    query_starts: Int32[Array, " S"],
    query_lens: Int32[Array, " S"],
    context_lens: Int32[Array, " S"],
    max_query_len: int,
    *,
    splits: int | None = None,
) -> Float[Array, "T N H"]:
    """Computes `api.paged_attention`; each block is split into `splits` parts along the pages."""
    (T, N, H), K = q.shape, keys.shape[2] // q.shape[2]
    G = N // K
    L = GROUPS * WARPGROUP_ROWS // G
    blocks = query_blocks(query_starts, query_lens, context_lens, T, L)
    C = blocks.sequence.shape[0]
    splits = splits or max(num_sms() // (C * K), 1)
    real = blocks.real.sum(axis=1, dtype=jnp.int32)
    first = blocks.positions[:, 0]
    rows = q[jnp.clip(blocks.rows, 0, T - 1)].reshape(C, L, K, G, H).swapaxes(1, 2).reshape(C * K * L * G, H)
    shape, dtype = rows.shape, q.dtype if splits == 1 else jnp.float32
    kernel = plgpu.kernel(
        functools.partial(_kernel, K=K, G=G, H=H, splits=splits),
        out_type=[jax.ShapeDtypeStruct((splits, *shape), dtype), jax.ShapeDtypeStruct((splits, shape[0]), jnp.float32)],
        grid=(C, K, splits),
        grid_names=("block", "head", "split"),
        num_threads=GROUPS + 1,  # the last one only fetches
        thread_name="group",
        scratch_types=[
            tiles(GROUPS * WARPGROUP_ROWS, H),
            *(tiles(STAGES, PAGE, H), tiles(STAGES, PAGE, H)),
            plgpu.Barrier(),
            *(plgpu.Barrier(num_barriers=STAGES), plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES)),
            *(plgpu.Barrier(num_barriers=STAGES), plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES)),
            plgpu.Barrier(num_arrivals=GROUPS),
        ],
        compiler_params=params(approximate=True),
        kernel_name="paged_attention_prefill",
    )
    flat = (x.reshape(-1, K * H) for x in (keys, values))
    out, logs = kernel(rows, *flat, block_tables, blocks.sequence, first, real)
    if splits > 1:
        factors = jnp.exp2(logs - logs.max(axis=0, keepdims=True))
        out = jnp.sum(out * (factors / factors.sum(axis=0, keepdims=True))[..., None], axis=0).astype(q.dtype)
    out = out.reshape(C, K, L, G, H).swapaxes(1, 2).reshape(C * L, N, H)
    row, has_sequence = token_rows(query_starts, query_lens, T, L)
    return jnp.where(has_sequence[:, None, None], out[row], jnp.zeros((), q.dtype))


def _kernel(*refs, K, G, H, splits):
    q, keys, values, block_tables, sequences, firsts, reals, out, logs, *scratch = refs
    q_s, k_s, v_s, q_ready, k_ready, k_free, v_ready, v_free, turn = scratch
    block, head, split, group = (lax.axis_index(name) for name in ("block", "head", "split", "group"))
    sequence, first, real = sequences[block], firsts[block], reals[block]
    context = first + real
    pages = jnp.where(real > 0, (context + PAGE - 1) // PAGE, 0)
    low, high = pages * split // splits, pages * (split + 1) // splits
    first_row = (block * K + head) * GROUPS * WARPGROUP_ROWS

    @pl.when((group == GROUPS) & (high > low))
    def _fetch():
        plgpu.set_max_registers(40, action="decrease")
        plgpu.copy_gmem_to_smem(q.at[pl.ds(first_row, GROUPS * WARPGROUP_ROWS)], q_s, q_ready)

        @pl.loop(low, high)
        def _(i):
            n = i - low
            slot, rows = lax.rem(n, STAGES), pl.ds(block_tables[sequence, i] * PAGE, PAGE)
            for source, buffer, ready, free in ((keys, k_s, k_ready, k_free), (values, v_s, v_ready, v_free)):
                pl.when(n >= STAGES)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(source.at[rows, pl.ds(head * H, H)], buffer.at[slot], ready.at[slot])

    @pl.when((group < GROUPS) & (high > low))
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        scale = H**-0.5 * math.log2(math.e)
        mine = pl.ds(group * WARPGROUP_ROWS, WARPGROUP_ROWS)
        position = first + (iota((WARPGROUP_ROWS, PAGE), 0) + group * WARPGROUP_ROWS) // G
        plgpu.barrier_wait(q_ready)
        pl.when(group == 1)(lambda: barrier_sync(turn))

        def page(i, carry):
            total, weight, largest = carry
            slot = lax.rem(i - low, STAGES)
            plgpu.barrier_wait(k_ready.at[slot])

            def multiply(accumulator):
                plgpu.wgmma(accumulator, q_s.at[mine], k_s.at[slot].transpose(TRANSPOSE))
                barrier_sync(turn)
                return accumulator[...]

            scores = pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, PAGE), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])

            def mask(x):
                return jnp.where(iota((WARPGROUP_ROWS, PAGE), 1) + i * PAGE <= position, x, -jnp.inf)

            scores = lax.cond((i + 1) * PAGE > first, mask, lambda x: x, scores)
            weights, decay, weight, largest = online_softmax(scores, weight, largest, scale)
            weights = weights.astype(q.dtype)
            plgpu.barrier_arrive(turn)
            total = total * along_rows(decay, H)
            plgpu.barrier_wait(v_ready.at[slot])
            pl.when((i + 1) * PAGE > context)(lambda: zero_rows(v_s.at[slot], context - i * PAGE))
            plgpu.barrier_wait(turn)
            total = accumulate(total, weights, v_s.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return total, weight, largest

        sums = lax.fori_loop(low, high, page, empty_softmax(H))
        pl.when(group == 0)(lambda: barrier_sync(turn))
        total, log = finish_softmax(*sums)
        rows = pl.ds(first_row + group * WARPGROUP_ROWS, WARPGROUP_ROWS)
        if splits == 1:
            q_s.at[mine][...] = total.astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[mine], out.at[0, rows])
            plgpu.wait_smem_to_gmem(0)
        else:
            store(out.at[split, rows], total)
        logs[split, rows] = log

    # A part without pages has no weight, but its result must not be NaN.
    @pl.when((group < GROUPS) & (high <= low) & (splits > 1))
    def _nothing():
        rows = pl.ds(first_row + group * WARPGROUP_ROWS, WARPGROUP_ROWS)
        store(out.at[split, rows], plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, H), out.dtype), MATRIX))
        logs[split, rows] = plgpu.layout_cast(jnp.full(WARPGROUP_ROWS, NEG_INF, jnp.float32), ROW)
