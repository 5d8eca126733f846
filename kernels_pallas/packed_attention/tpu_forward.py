"""Forward kernel of packed attention on TPU: one block of rows in each step of the grid, all heads.

Heads of 72 lie side by side in rows of 1,152, as the projections produce them. The kernel copies each head to
lanes of its own, once per window. Heads padded to 128 beforehand would cost one more pass over all data of
the kernel.
Glossary: P rows, L rows of a block, W rows of a window, N heads, H head width, D = N x H.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.packed_attention.tpu_views import ALIGNED, column, cut_blocks, outside_mask, visit_window
from kernels_pallas.tpu.stream import LANES, LOG2_E, NEG_INF, SoftmaxUpdate, block_index, dot, grid, update_softmaxes, visit_all
from kernels_pallas.tuning import tuned_config

TILE = 128  # rows computed at once


class BlockSizes(NamedTuple):
    """Sizes of the kernels' blocks.

    Attributes:
      heads: all heads.
      rows: rows of a block.
      tile: rows computed at once.
      window: rows of a window.
    """

    heads: int
    rows: int
    tile: int
    window: int

    def limits(self) -> pltpu.CompilerParams:
        """Returns compiler options.

        Two cores may compute two blocks at once, and the buffers on chip exceed the default limit.
        """
        return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=56 * 2**20)


def window_rows(P: int, longest: int, dtype: jnp.dtype) -> int:
    """Returns the rows of a window.

    A window holds the longest view, or an even part of it if the view exceeds the limit. It begins up to a
    tile before the view.
    """
    # 2,304 bytes of a column are 1,152 rows of bfloat16: all views of most pictures fit one window.
    rows, limit = max(longest, TILE) + ALIGNED - 1, tuned_config("tpu", "packed_attention").window_bytes // dtype.itemsize
    return min(-(-rows // pl.cdiv(rows, limit) // ALIGNED) * ALIGNED, P)


def split_heads(rows_ref, heads_ref) -> None:
    """Copies [rows, N x H] to [N, rows, H]."""
    N, _, H = heads_ref.shape
    for n in range(N):
        heads_ref[n] = rows_ref[:, n * H : (n + 1) * H]


def for_heads(N: int, compute) -> None:
    """Calls `compute` with the numbers of a few heads at a time, until all are done.

    The steps of heads computed together hide each other's latency.
    """
    together = math.gcd(N, tuned_config("tpu", "packed_attention").together)

    def group(i, _):
        compute([i * together + j for j in range(together)])

    jax.lax.fori_loop(0, N // together, group, None)


def block_sizes(N: int, P: int, longest: int, dtype: jnp.dtype) -> BlockSizes:
    """Returns the block sizes for a row of P rows."""
    return BlockSizes(
        N, tuned_config("tpu", "packed_attention").block_bytes // dtype.itemsize, TILE, window_rows(P, longest, dtype)
    )


def forward(
    q: Float[Array, "P D"],
    k: Float[Array, "P D"],
    v: Float[Array, "P D"],
    lower: Int32[Array, " P"],
    upper: Int32[Array, " P"],
    sizes: BlockSizes,
    *,
    sums: bool = False,
) -> tuple[Float[Array, "P D"], *tuple[Float32[Array, "P lanes"], ...]]:
    """Runs the kernel over all rows.

    P is a multiple of 16 and at least a window; `lower` and `upper` are the bounds of each row's view. Rows
    of no view must be finite; their results are zeros.

    Returns:
      The result. With `sums` also an array whose lane n has the base-2 logarithm of head n's sum of
        exponentials.
    """
    (P, D), (N, L, tile, W) = q.shape, sizes
    blocks = pl.cdiv(P, L)
    cores, steps = grid(blocks)
    *scalars, lower, upper = cut_blocks(lower, upper, L, tile, W, 2 * cores)

    def block(*shape):
        return pl.BlockSpec(shape, lambda core, step, *_: (block_index(core, step, blocks), *[0] * (len(shape) - 1)))

    rows, views, hbm = block(L, D), block(1, L // tile, tile), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, steps),
            in_specs=[views, views, rows, hbm, hbm],
            out_specs=[rows, *[block(L, LANES)] * sums],
            scratch_shapes=[
                pltpu.VMEM((2, W, D), q.dtype),
                pltpu.VMEM((2, W, D), q.dtype),
                pltpu.VMEM((N, L, D // N), q.dtype),
                pltpu.VMEM((N, W, D // N), q.dtype),
                pltpu.VMEM((N, W, D // N), q.dtype),
                pltpu.VMEM((N, L, D // N), jnp.float32),
                pltpu.VMEM((N, L, LANES), jnp.float32),
                pltpu.VMEM((N, L, LANES), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), *[jax.ShapeDtypeStruct((P, LANES), jnp.float32)] * sums],
        compiler_params=sizes.limits(),
        name="packed_attention",
    )(*scalars, lower, upper, q, k, v)


def _kernel(
    begin,
    size,
    visits,
    view_begins,
    view_ends,
    lower_ref,
    upper_ref,
    q_ref,
    k_hbm,
    v_hbm,
    *outputs_and_scratch,
    sizes,
):
    out_ref, *sums_refs = outputs_and_scratch[:-10]
    k_buffers, v_buffers, q_heads, k_heads, v_heads, *running, slot_ref, semaphores = outputs_and_scratch[-10:]
    total_ref, largest_ref, weight_ref = running
    cores, step = pl.num_programs(0), pl.program_id(1)
    block = step * cores + pl.program_id(0)
    N, L, tile, W = sizes
    P, H = k_hbm.shape[0], q_ref.shape[1] // N

    def fetch(ahead, visit, slot, action):
        row = visit_window(begin, size, visits, block + ahead * cores, visit, W, P).row
        for source, buffers in ((k_hbm, k_buffers), (v_hbm, v_buffers)):
            transfer = pltpu.make_async_copy(source.at[pl.ds(row, W)], buffers.at[slot], semaphores.at[slot])
            getattr(transfer, action)()

    total_ref[...] = jnp.zeros_like(total_ref)
    weight_ref[...] = jnp.zeros_like(weight_ref)
    largest_ref[...] = jnp.full_like(largest_ref, NEG_INF)

    @pl.when(visits[block] > 0)
    def _():
        split_heads(q_ref, q_heads)

    def compute(visit, slot):
        split_heads(k_buffers.at[slot], k_heads)
        split_heads(v_buffers.at[slot], v_heads)
        visited = visit_window(begin, size, visits, block, visit, W, P)

        def attend(i, _):
            @pl.when(overlaps_tile(view_begins, view_ends, block * (L // tile) + i, visited))
            def _():
                rows = pl.ds(pl.multiple_of(i * tile, tile), tile)
                own = (column(ref[0, pl.ds(i, 1)]) for ref in (lower_ref, upper_ref))
                mask = outside_mask(*own, visited, (tile, W), 1)

                def softmax(n):
                    scores = dot("qh,kh->qk", q_heads[n, rows], k_heads[n]) * (H**-0.5 * LOG2_E) + mask
                    return SoftmaxUpdate(scores, v_heads[n], *(x.at[n, rows] for x in running))

                for_heads(N, lambda heads: update_softmaxes([softmax(n) for n in heads]))

        jax.lax.fori_loop(0, L // tile, attend, None)

    visit_all(step, visits[block], visits[block + cores], fetch, compute, slot_ref)

    @pl.when(block * L < P)
    def _():
        lane = jax.lax.broadcasted_iota(jnp.int32, (L, LANES), 1)
        for n in range(N):
            weight = jnp.where(weight_ref[n] > 0, weight_ref[n], 1.0)
            out_ref[:, n * H : (n + 1) * H] = (total_ref[n] / weight[:, :1]).astype(out_ref.dtype)
            for sums_ref in sums_refs:
                sum_ = largest_ref[n] + jnp.log2(weight)
                sums_ref[...] = jnp.where(lane == n, sum_, sums_ref[...] if n else jnp.zeros_like(sum_))


def overlaps_tile(view_begins, view_ends, tile, visited):
    """Returns whether a visit covers rows of the views of a tile's rows."""
    return (view_begins[tile] < visited.end) & (view_ends[tile] > visited.first)
