"""Forward kernel of causal attention for Hopper.

A block has 128 queries of a head, half for each of two warpgroups. The two visit the keys together and take
turns at the matrix unit: while one computes scores, the other computes its softmax. A third warpgroup only
fetches. Tiles are masked only where some query's range begins or ends.
Glossary: T tokens of all rows, N query heads, K key-value heads, H head width.
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
    barrier_sync,
    empty_softmax,
    finish_softmax,
    load,
    online_softmax,
    params,
    tiles,
)
from kernels_pallas.gpu.tile_ranges import plan_tile_ranges, visible

GROUPS = 2  # warpgroups that compute
TILE = 64  # keys
STAGES = 2  # buffers of keys, and of values


def forward(
    q: Float[Array, "T N H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"], begin: Int32[Array, " T"]
) -> tuple[Float[Array, "T N H"], Float32[Array, "N T"]]:
    """Attends tokens to the tokens from `begin` to their own.

    Returns:
      The result, and the base-2 logarithm of each token's sum of weights.
    """
    T, N, H = q.shape
    ranges = plan_tile_ranges(begin, jnp.arange(1, T + 1, dtype=jnp.int32), GROUPS, TILE)
    blocks = ranges.begin.shape[0]
    kernel = plgpu.kernel(
        functools.partial(_kernel, N=N, G=N // k.shape[1], H=H, blocks=blocks),
        out_type=[
            jax.ShapeDtypeStruct((T, N * H), q.dtype),
            jax.ShapeDtypeStruct((N, blocks * GROUPS * WARPGROUP_ROWS), jnp.float32),
        ],
        grid=(blocks * N,),
        grid_names=("item",),
        num_threads=GROUPS + 1,  # the last one only fetches
        thread_name="group",
        scratch_types=[
            tiles(GROUPS * WARPGROUP_ROWS, H),
            *(tiles(STAGES, TILE, H), tiles(STAGES, TILE, H)),
            plgpu.Barrier(),
            *(plgpu.Barrier(num_barriers=STAGES), plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES)),
            *(plgpu.Barrier(num_barriers=STAGES), plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES)),
            plgpu.Barrier(num_arrivals=GROUPS),
        ],
        compiler_params=params(approximate=True),
        kernel_name="causal_attention",
    )
    out, sums = kernel(*(x.reshape(T, -1) for x in (q, k, v)), *ranges)
    return out.reshape(T, N, H), sums[:, :T]


def _kernel(*refs, N, G, H, blocks):
    q, k, v, first, end, begin, count, group_tiles, out, sums, *scratch = refs
    q_s, k_s, v_s, q_ready, k_ready, k_free, v_ready, v_free, turn = scratch
    item, group = lax.axis_index("item"), lax.axis_index("group")
    block, head = blocks - 1 - item // N, lax.rem(item, N)  # a row's last queries see the most keys: they begin first
    start, num_tiles = begin[block], count[block]
    mine = pl.ds(group * WARPGROUP_ROWS, WARPGROUP_ROWS)

    @pl.when(group == GROUPS)
    def _fetch():
        plgpu.set_max_registers(40, action="decrease")
        rows = pl.ds(block * GROUPS * WARPGROUP_ROWS, GROUPS * WARPGROUP_ROWS)
        plgpu.copy_gmem_to_smem(q.at[rows, pl.ds(head * H, H)], q_s, q_ready)

        @pl.loop(0, num_tiles)
        def _(i):
            slot, rows = lax.rem(i, STAGES), pl.ds(start + i * TILE, TILE)
            for source, buffer, ready, free in ((k, k_s, k_ready, k_free), (v, v_s, v_ready, v_free)):
                pl.when(i >= STAGES)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(source.at[rows, pl.ds(head // G * H, H)], buffer.at[slot], ready.at[slot])

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        scale = H**-0.5 * math.log2(math.e)
        rows = pl.ds((block * GROUPS + group) * WARPGROUP_ROWS, WARPGROUP_ROWS)
        unmasked_begin, unmasked_end = group_tiles[block, group, 2], group_tiles[block, group, 3]
        low, high = load(first.at[rows]), load(end.at[rows])
        plgpu.barrier_wait(q_ready)
        pl.when(group == 1)(lambda: barrier_sync(turn))

        def visit(i, carry):
            total, weight, largest = carry
            slot = lax.rem(i, STAGES)
            plgpu.barrier_wait(k_ready.at[slot])

            def multiply(accumulator):
                plgpu.wgmma(accumulator, q_s.at[mine], k_s.at[slot].transpose(TRANSPOSE))
                barrier_sync(turn)
                return accumulator[...]

            scores = pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, TILE), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])
            masked = (i < unmasked_begin) | (i >= unmasked_end)
            scores = lax.cond(masked, lambda x: visible(x, low, high, start + i * TILE), lambda x: x, scores)
            weights, decay, weight, largest = online_softmax(scores, weight, largest, scale)
            weights = weights.astype(q.dtype)
            plgpu.barrier_arrive(turn)
            total = total * along_rows(decay, H)
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(turn)
            total = accumulate(total, weights, v_s.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return total, weight, largest

        sums_of_rows = lax.fori_loop(0, num_tiles, visit, empty_softmax(H))
        pl.when(group == 0)(lambda: barrier_sync(turn))
        result, log = finish_softmax(*sums_of_rows)
        q_s.at[mine][...] = result.astype(out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s.at[mine], out.at[rows, pl.ds(head * H, H)])
        sums[head, rows] = log
        plgpu.wait_smem_to_gmem(0)
