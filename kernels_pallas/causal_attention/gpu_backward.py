"""Backward kernels of causal attention for Hopper: one visits keys for dq, one visits queries for dk and dv.

Both recompute a tile's weights from the forward's sums (arXiv:2205.14135):

    S = q k^T,  W = exp(S - sums),  dW = do v^T,  dS = W (dW - delta),  dq = dS k,

and the same in transposed matrices, dk = dS^T q and dv = W^T do. The gradient of 64 keys or values of a head
fills a warpgroup's registers. So one warpgroup of a block has the values' gradient and another has the keys',
which computes the scores again. Each result has one owner, so nothing is added across blocks: one block
visits all query heads of a key-value head.
Glossary: T tokens of all rows, N query heads, K key-value heads, G query heads of each, H head width.
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
    barrier_sync,
    load,
    params,
    product,
    tiles,
)
from kernels_pallas.gpu.tile_ranges import plan_tile_ranges, visible

TILE = 64
GROUPS = 2  # warpgroups with queries in a block of the queries' kernel
RING = 3  # buffers of the queries' kernel, which hold tiles of values and keys in turn
STAGES = 2  # buffers of queries and of cotangents in the other kernel


def backward(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    out: Float[Array, "T N H"],
    sums: Float32[Array, "N T"],
    cotangent: Float[Array, "T N H"],
    begin: Int32[Array, " T"],
    end: Int32[Array, " T"],
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """Returns the gradients of `gpu_forward.forward`'s first result with respect to q, k and v.

    `begin` and `end` bound each token's sequence.
    """
    shapes = q.shape, k.shape, v.shape
    delta = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1).T
    reach = (0, GROUPS * WARPGROUP_ROWS + TILE)  # blocks and tiles may end this far behind the last token
    sums, delta = (jnp.pad(x, ((0, 0), reach)) for x in (sums, delta))
    token = jnp.arange(q.shape[0], dtype=jnp.int32)
    q, k, v, cotangent = (x.reshape(x.shape[0], -1) for x in (q, k, v, cotangent))
    query_ranges, key_ranges = plan_tile_ranges(begin, token + 1, GROUPS, TILE), plan_tile_ranges(token, end, 1, TILE)
    dq = _queries(q, cotangent, k, v, sums, delta, query_ranges, *shapes[0][1:], shapes[1][1])
    dk, dv = _keys(q, cotangent, k, v, sums, delta, key_ranges, *shapes[0][1:], shapes[1][1])
    return tuple(x.reshape(shape) for x, shape in zip((dq, dk, dv), shapes, strict=True))


def _queries(q, cotangent, k, v, sums, delta, ranges, N, H, K):
    blocks = ranges.begin.shape[0]
    kernel = plgpu.kernel(
        functools.partial(_queries_kernel, N=N, G=N // K, H=H, blocks=blocks),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(blocks * N,),
        grid_names=("item",),
        num_threads=GROUPS + 1,  # the last one only fetches
        thread_name="group",
        scratch_types=[
            *(tiles(GROUPS * WARPGROUP_ROWS, H), tiles(GROUPS * WARPGROUP_ROWS, H)),
            tiles(RING, TILE, H),
            plgpu.Barrier(num_arrivals=2),
            *(plgpu.Barrier(num_barriers=RING), plgpu.Barrier(num_arrivals=GROUPS, num_barriers=RING)),
        ],
        compiler_params=params(approximate=True),
        kernel_name="causal_attention_dq",
    )
    return kernel(q, cotangent, k, v, sums, delta, *ranges)


def _queries_kernel(*refs, N, G, H, blocks):
    q, cotangent, k, v, sums, delta, first, end, begin, count, group_tiles, out, q_s, o_s, ring_s, rows_ready, ready, free = refs
    item, group = lax.axis_index("item"), lax.axis_index("group")
    block, head = blocks - 1 - item // N, lax.rem(item, N)  # a row's last queries see most: they begin first
    start, num_tiles = begin[block], count[block]
    mine = pl.ds(group * WARPGROUP_ROWS, WARPGROUP_ROWS)

    @pl.when(group == GROUPS)
    def _fetch():
        plgpu.set_max_registers(40, action="decrease")
        rows = pl.ds(block * GROUPS * WARPGROUP_ROWS, GROUPS * WARPGROUP_ROWS)
        for source, buffer in ((q, q_s), (cotangent, o_s)):
            plgpu.copy_gmem_to_smem(source.at[rows, pl.ds(head * H, H)], buffer, rows_ready)

        @pl.loop(0, num_tiles)
        def _(i):
            for n, source in ((2 * i, v), (2 * i + 1, k)):
                slot = lax.rem(n, RING)
                pl.when(n >= RING)(lambda slot=slot: plgpu.barrier_wait(free.at[slot]))
                tile = source.at[pl.ds(start + i * TILE, TILE), pl.ds(head // G * H, H)]
                plgpu.copy_gmem_to_smem(tile, ring_s.at[slot], ready.at[slot])

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds((block * GROUPS + group) * WARPGROUP_ROWS, WARPGROUP_ROWS)
        unmasked_begin, unmasked_end = group_tiles[block, group, 2], group_tiles[block, group, 3]
        low, high = load(first.at[rows]), load(end.at[rows])
        log, deltas = (load(x.at[head, rows]) for x in (sums, delta))
        plgpu.barrier_wait(rows_ready)

        def visit(i, total):
            of_v, of_k = lax.rem(2 * i, RING), lax.rem(2 * i + 1, RING)
            plgpu.barrier_wait(ready.at[of_v])
            d_scores = product(o_s.at[mine], ring_s.at[of_v].transpose(TRANSPOSE)) - along_rows(deltas, TILE)
            plgpu.barrier_arrive(free.at[of_v])
            plgpu.barrier_wait(ready.at[of_k])
            scores = product(q_s.at[mine], ring_s.at[of_k].transpose(TRANSPOSE))
            masked = (i < unmasked_begin) | (i >= unmasked_end)
            scores = lax.cond(masked, lambda x: visible(x, low, high, start + i * TILE), lambda x: x, scores)
            d_scores = _weights(scores, along_rows(log, TILE), H) * d_scores
            total = accumulate(total, d_scores.astype(out.dtype), ring_s.at[of_k])
            plgpu.barrier_arrive(free.at[of_k])
            return total

        zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, H), jnp.float32), MATRIX)
        total = lax.fori_loop(0, num_tiles, visit, zeros)
        _store(total * H**-0.5, q_s.at[mine], out.at[rows, pl.ds(head * H, H)])


def _keys(q, cotangent, k, v, sums, delta, ranges, N, H, K):
    blocks = ranges.begin.shape[0]
    kernel = plgpu.kernel(
        functools.partial(_keys_kernel, K=K, G=N // K, H=H),
        out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        grid=(blocks * K,),
        grid_names=("item",),
        num_threads=3,  # values, keys, and one that only fetches
        thread_name="group",
        scratch_types=[
            *(tiles(WARPGROUP_ROWS, H), tiles(WARPGROUP_ROWS, H)),
            *(tiles(STAGES, TILE, H), tiles(STAGES, TILE, H)),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2),
        ],
        compiler_params=params(approximate=True),
        kernel_name="causal_attention_dkv",
    )
    return kernel(q, cotangent, k, v, sums, delta, *ranges)


def _keys_kernel(*refs, K, G, H):
    q, cotangent, k, v, sums, delta, first, end, begin, count, group_tiles, dk, dv, *scratch = refs
    k_s, v_s, q_s, o_s, rows_ready, ready, free, done = scratch
    item, group = lax.axis_index("item"), lax.axis_index("group")
    block, head = item // K, lax.rem(item, K)  # a row's first keys have the most queries: they begin first
    start, num_tiles = begin[block], count[block]
    rows, lanes = pl.ds(block * WARPGROUP_ROWS, WARPGROUP_ROWS), pl.ds(head * H, H)

    def tile_of(n):
        """Returns the query head and the first query of a tile."""
        return head * G + n // num_tiles, start + lax.rem(n, num_tiles) * TILE

    @pl.when(group == 2)
    def _fetch():
        plgpu.set_max_registers(40, action="decrease")
        for source, buffer in ((k, k_s), (v, v_s)):
            plgpu.copy_gmem_to_smem(source.at[rows, lanes], buffer, rows_ready)

        @pl.loop(0, num_tiles * G)
        def _(n):
            slot, (of_head, query) = lax.rem(n, STAGES), tile_of(n)
            pl.when(n >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
            for source, buffer in ((q, q_s), (cotangent, o_s)):
                tile = source.at[pl.ds(query, TILE), pl.ds(of_head * H, H)]
                plgpu.copy_gmem_to_smem(tile, buffer.at[slot], ready.at[slot])

    def run(add, buffer, out, factor):
        plgpu.set_max_registers(232, action="increase")
        unmasked_begin, unmasked_end = group_tiles[block, 0, 2], group_tiles[block, 0, 3]
        low, high = load(first.at[rows]), load(end.at[rows])
        plgpu.barrier_wait(rows_ready)

        def visit(n, total):
            slot, (of_head, query) = lax.rem(n, STAGES), tile_of(n)
            log, deltas = (along_columns(load(x.at[of_head, pl.ds(query, TILE)], COL), WARPGROUP_ROWS) for x in (sums, delta))
            plgpu.barrier_wait(ready.at[slot])
            scores = product(k_s, q_s.at[slot].transpose(TRANSPOSE))
            i = lax.rem(n, num_tiles)
            masked = (i < unmasked_begin) | (i >= unmasked_end)
            scores = lax.cond(masked, lambda x: visible(x, low, high, query), lambda x: x, scores)
            total = add(total, _weights(scores, log, H), deltas, q_s.at[slot], o_s.at[slot])
            plgpu.barrier_arrive(free.at[slot])
            return total

        zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, H), jnp.float32), MATRIX)
        total = lax.fori_loop(0, num_tiles * G, visit, zeros)
        barrier_sync(done)  # both warpgroups have read their keys, so the buffers are free
        _store(total * factor, buffer, out.at[rows, lanes])

    def add_to_values(total, weights, deltas, queries, cotangents):
        return accumulate(total, weights.astype(dv.dtype), cotangents)

    def add_to_keys(total, weights, deltas, queries, cotangents):
        d_scores = weights * (product(v_s, cotangents.transpose(TRANSPOSE)) - deltas)
        return accumulate(total, d_scores.astype(dk.dtype), queries)

    pl.when(group == 0)(lambda: run(add_to_values, k_s, dv, 1.0))
    pl.when(group == 1)(lambda: run(add_to_keys, v_s, dk, H**-0.5))


def _weights(scores, log, H):
    return jnp.exp2(scores * (H**-0.5 * math.log2(math.e)) - log)


def _store(result, buffer, destination):
    buffer[...] = result.astype(buffer.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, destination)
    plgpu.wait_smem_to_gmem(0)
