"""Backward kernels of packed attention for Hopper: one body, run once for dq and once for dk and dv.

Both recompute a tile's weights from the forward's sums (arXiv:2205.14135). With rows of queries that visit
keys,

    S = q k^T,  W = exp(S - sums),  dW = do v^T,  dS = W (dW - delta),  dq = dS k,

and with rows of keys that visit queries the same in transposed matrices, S^T = k q^T, dW^T = v do^T, whose
sums and deltas go along columns: dk = dS^T q, and dv = W^T do. So no matrix is transposed, and each result
has one owner: nothing is added across blocks.
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
    COL,
    MATRIX,
    TRANSPOSE,
    WARPGROUP_ROWS,
    accumulate,
    along_columns,
    along_rows,
    load,
    params,
    product,
    tiles,
)
from kernels_pallas.gpu.tile_ranges import HEAD_PAD, columns, plan_tile_ranges, store_head, visible, zero_neighbour
from kernels_pallas.tuning import tuned_config


def backward(
    q: Float[Array, "P N H"],
    k: Float[Array, "P N H"],
    v: Float[Array, "P N H"],
    out: Float[Array, "P N H"],
    sums: Float32[Array, "N R"],
    cotangent: Float[Array, "P N H"],
    first: Int32[Array, " P"],
    end: Int32[Array, " P"],
) -> tuple[Float[Array, "P N H"], Float[Array, "P N H"], Float[Array, "P N H"]]:
    """Returns the gradients of `gpu_forward.forward`'s first result with respect to q, k and v."""
    P, N, H = q.shape
    config = tuned_config("hopper", "packed_attention_backward", P)
    delta = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1).T
    rows = config.groups * WARPGROUP_ROWS
    reach = (0, -(-P // rows) * rows + config.tile - P)  # a tile may end this far behind the last row
    sums, delta = (jnp.pad(x[:, :P], ((0, 0), reach)) for x in (sums, delta))
    ranges = plan_tile_ranges(first, end, config.groups, config.tile)
    flat = [x.reshape(P, N * H) for x in (q, k, v, cotangent)]
    q, k, v, cotangent = flat
    (dq,) = _run("packed_attention_dq", (q, cotangent, k, v), sums, delta, ranges, N, config, results=1)
    dk, dv = _run("packed_attention_dkv", (k, v, q, cotangent), sums, delta, ranges, N, config, results=2)
    return dq, dk, dv


def _run(name, operands, sums, delta, ranges, N, config, results):
    P, H = operands[0].shape[0], operands[0].shape[1] // N
    groups, tile, stages = config.groups, config.tile, config.stages
    kernel = plgpu.kernel(
        functools.partial(_kernel, N=N, H=H, groups=groups, tile=tile, stages=stages, results=results),
        out_type=[jax.ShapeDtypeStruct((P, N, H), operands[0].dtype)] * results,
        grid=(ranges.begin.shape[0], N),
        grid_names=("block", "head"),
        num_threads=groups + 1,  # the last one only fetches
        thread_name="group",
        scratch_types=[
            *(tiles(groups * WARPGROUP_ROWS, H + HEAD_PAD, swizzle=32) for _ in range(2)),
            *(tiles(stages, tile, H + HEAD_PAD, swizzle=32) for _ in range(2)),
            plgpu.SMEM((groups, WARPGROUP_ROWS, H), operands[0].dtype),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        ],
        compiler_params=params(approximate=True),
        kernel_name=name,
    )
    return kernel(*operands, sums, delta, *ranges)


def _kernel(*refs, N, H, groups, tile, stages, results):
    row_refs, tile_refs, (sums, delta, first, end, begin, count, group_tiles), rest = refs[:2], refs[2:4], refs[4:11], refs[11:]
    outs, (rows_a, rows_b, tile_a, tile_b, out_s, ready_rows, ready, free) = rest[:results], rest[results:]
    block, head, group = (lax.axis_index(name) for name in ("block", "head", "group"))
    start, num_tiles, mine = begin[block], count[block], columns(head, H)

    @pl.when(group == groups)
    def _fetch():
        plgpu.set_max_registers(40, action="decrease")
        rows = pl.ds(block * groups * WARPGROUP_ROWS, groups * WARPGROUP_ROWS)
        for source, buffer in zip(row_refs, (rows_a, rows_b), strict=True):
            plgpu.copy_gmem_to_smem(source.at[rows, mine], buffer, ready_rows)

        @pl.loop(0, num_tiles)
        def _(i):
            slot = lax.rem(i, stages)
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            for source, buffer in zip(tile_refs, (tile_a, tile_b), strict=True):
                plgpu.copy_gmem_to_smem(source.at[pl.ds(start + i * tile, tile), mine], buffer.at[slot], ready.at[slot])

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds((block * groups + group) * WARPGROUP_ROWS, WARPGROUP_ROWS)
        read_begin, read_end, unmasked_begin, unmasked_end = (group_tiles[block, group, i] for i in range(4))
        low, high = load(first.at[rows]), load(end.at[rows])
        row_stats = [along_rows(load(x.at[head, rows]), tile) for x in (sums, delta)] if results == 1 else None
        plgpu.barrier_wait(ready_rows)
        a, b = (x.at[pl.ds(group * WARPGROUP_ROWS, WARPGROUP_ROWS)] for x in (rows_a, rows_b))
        for x in (a, b):
            zero_neighbour(x, head, H)

        def skip(i, _):
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(ready.at[slot])
            plgpu.barrier_arrive(free.at[slot])

        def visit(i, totals):
            slot, tile_start = lax.rem(i, stages), start + i * tile
            columns_here = pl.ds(tile_start, tile)
            stats = row_stats or [along_columns(load(x.at[head, columns_here], COL), WARPGROUP_ROWS) for x in (sums, delta)]
            plgpu.barrier_wait(ready.at[slot])
            scores = product(a, tile_a.at[slot].transpose(TRANSPOSE))
            masked = (i < unmasked_begin) | (i >= unmasked_end)
            scores = lax.cond(masked, lambda x: visible(x, low, high, tile_start), lambda x: x, scores)
            weights = jnp.exp2(scores * (H**-0.5 * math.log2(math.e)) - stats[0])
            d_scores = (weights * (product(b, tile_b.at[slot].transpose(TRANSPOSE)) - stats[1])).astype(tile_a.dtype)
            totals = [accumulate(totals[0], d_scores, tile_a.at[slot]), *totals[1:]]
            if results == 2:
                totals[1] = accumulate(totals[1], weights.astype(tile_b.dtype), tile_b.at[slot])
            plgpu.barrier_arrive(free.at[slot])
            return tuple(totals)

        zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, H + HEAD_PAD), jnp.float32), MATRIX)
        lax.fori_loop(0, read_begin, skip, None)
        totals = lax.fori_loop(read_begin, read_end, visit, (zeros,) * results)
        lax.fori_loop(read_end, num_tiles, skip, None)
        for total, out, factor in zip(totals, outs, (H**-0.5, 1.0), strict=False):
            store_head((total * factor).astype(out.dtype), head, H, out_s.at[group], out.at[rows, head])
        plgpu.wait_smem_to_gmem(0)
