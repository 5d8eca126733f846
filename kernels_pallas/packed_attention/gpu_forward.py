"""Forward kernel of packed attention for Hopper.

Blocks stay on the chip and process one pair (block of rows, head) after the other. One warpgroup only
fetches, ahead into the next pair too. The others have 64 rows each; while one waits for the matrix unit,
another computes its softmax.
Glossary: P patches, R of them rounded up to whole blocks, N heads, H head width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.gpu.mosaic import (
    TRANSPOSE,
    WARPGROUP_ROWS,
    accumulate,
    along_rows,
    empty_softmax,
    finish_softmax,
    load,
    num_sms,
    online_softmax,
    params,
    product,
    tiles,
)
from kernels_pallas.gpu.tile_ranges import HEAD_PAD, columns, plan_tile_ranges, store_head, visible, zero_neighbour
from kernels_pallas.tuning import tuned_config


def forward(
    q: Float[Array, "P N H"],
    k: Float[Array, "P N H"],
    v: Float[Array, "P N H"],
    first: Int32[Array, " P"],
    end: Int32[Array, " P"],
) -> tuple[Float[Array, "P N H"], Float32[Array, "N R"]]:
    """Attends rows to the rows from `first` to `end`.

    Returns:
      The result, and the base-2 logarithm of each row's sum of weights.
    """
    P, N, H = q.shape
    config = tuned_config("hopper", "packed_attention", P)
    groups, tile, stages, sms = config.groups, config.tile, config.stages, num_sms()
    ranges = plan_tile_ranges(first, end, groups, tile)
    kernel = plgpu.kernel(
        functools.partial(_kernel, N=N, H=H, groups=groups, tile=tile, stages=stages, sms=sms),
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((N, ranges.first.shape[0]), jnp.float32),
        ],
        grid=(sms,),
        grid_names=("sm",),
        num_threads=groups + 1,  # the last one only fetches
        thread_name="group",
        scratch_types=[
            tiles(2, groups * WARPGROUP_ROWS, H + HEAD_PAD, swizzle=32),
            *(tiles(stages, tile, H + HEAD_PAD, swizzle=32) for _ in range(2)),
            plgpu.SMEM((groups, WARPGROUP_ROWS, H), q.dtype),
            *(plgpu.Barrier(num_barriers=2), plgpu.Barrier(num_arrivals=groups, num_barriers=2)),
            *(plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_arrivals=groups, num_barriers=stages)),
            *(plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_arrivals=groups, num_barriers=stages)),
        ],
        compiler_params=params(approximate=True),
        kernel_name="packed_attention",
    )
    out, sums = kernel(*(x.reshape(P, N * H) for x in (q, k, v)), *ranges)
    return out, sums


def _kernel(*refs, N, H, groups, tile, stages, sms):
    q, k, v, first, end, begin, count, group_tiles, out, sums, q_s, k_s, v_s, out_s, *barriers = refs
    q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    sm, group = lax.axis_index("sm"), lax.axis_index("group")
    wide, items = H + HEAD_PAD, (begin.shape[0] * N - sm + sms - 1) // sms

    def pair(n):
        item = n * sms + sm
        return item // N, lax.rem(item, N)

    @pl.when(group == groups)
    def _fetch():
        plgpu.set_max_registers(24, action="decrease")

        def item(n, ring):
            (block, head), q_slot = pair(n), lax.rem(n, 2)
            start, num_tiles, mine = begin[block], count[block], columns(head, H)
            pl.when(n >= 2)(lambda: plgpu.barrier_wait(q_free.at[q_slot]))
            rows = pl.ds(block * groups * WARPGROUP_ROWS, groups * WARPGROUP_ROWS)
            plgpu.copy_gmem_to_smem(q.at[rows, mine], q_s.at[q_slot], q_ready.at[q_slot])

            @pl.loop(0, num_tiles)
            def _(i):
                slot, rows = lax.rem(ring + i, stages), pl.ds(start + i * tile, tile)
                for source, buffer, ready, free in ((k, k_s, k_ready, k_free), (v, v_s, v_ready, v_free)):
                    pl.when(ring + i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(source.at[rows, mine], buffer.at[slot], ready.at[slot])

            return ring + num_tiles

        lax.fori_loop(0, items, item, jnp.int32(0))

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(160, action="increase")
        scale = H**-0.5 * math.log2(math.e)

        def item(n, ring):
            (block, head), q_slot = pair(n), lax.rem(n, 2)
            rows = pl.ds((block * groups + group) * WARPGROUP_ROWS, WARPGROUP_ROWS)
            start, num_tiles = begin[block], count[block]
            read_begin, read_end, unmasked_begin, unmasked_end = (group_tiles[block, group, i] for i in range(4))
            low, high = load(first.at[rows]), load(end.at[rows])
            plgpu.barrier_wait(q_ready.at[q_slot])
            q_rows = q_s.at[q_slot, pl.ds(group * WARPGROUP_ROWS, WARPGROUP_ROWS)]
            zero_neighbour(q_rows, head, H)

            def skip(i, _):
                slot = lax.rem(ring + i, stages)
                for ready, free in ((k_ready, k_free), (v_ready, v_free)):
                    plgpu.barrier_wait(ready.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

            def visit(i, carry):
                total, weight, largest = carry
                slot = lax.rem(ring + i, stages)
                plgpu.barrier_wait(k_ready.at[slot])
                scores = product(q_rows, k_s.at[slot].transpose(TRANSPOSE))
                plgpu.barrier_arrive(k_free.at[slot])
                masked = (i < unmasked_begin) | (i >= unmasked_end)
                scores = lax.cond(masked, lambda x: visible(x, low, high, start + i * tile), lambda x: x, scores)
                weights, decay, weight, largest = online_softmax(scores, weight, largest, scale)
                total = total * along_rows(decay, wide)
                plgpu.barrier_wait(v_ready.at[slot])
                total = accumulate(total, weights.astype(q.dtype), v_s.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
                return total, weight, largest

            lax.fori_loop(0, read_begin, skip, None)
            sums_of_rows = lax.fori_loop(read_begin, read_end, visit, empty_softmax(wide))
            lax.fori_loop(read_end, num_tiles, skip, None)
            plgpu.barrier_arrive(q_free.at[q_slot])
            result, log = finish_softmax(*sums_of_rows)
            store_head(result.astype(out.dtype), head, H, out_s.at[group], out.at[rows, head])
            sums[head, rows] = log
            return ring + num_tiles

        lax.fori_loop(0, items, item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
