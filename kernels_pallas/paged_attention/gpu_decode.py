"""Paged attention for Hopper with one or a few queries per sequence: bound by one read of keys and values.

The pages of all sequences form one line that is split evenly. Each SM runs one block, which reads a run of
pages; the run may begin and end inside a sequence. The block writes a partial result for each sequence of its
run, and a second kernel combines them. Block b's partial result of sequence s has index b + s. Along the line
either b or s increases, so no two share an index, and those of a sequence are neighbours.

One warpgroup only fetches. Each of the two others has a key-value head and a ring of buffers. The 8 rows of a
token's query heads are rows of one 64-row product. Most of that product is unused, but it takes only a third
of the time of the memory reads.
Glossary: S sequences, N query heads, K key-value heads, H head width, M pages of the longest sequence, R
query rows of a sequence.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from kernels_pallas.gpu.mosaic import (
    NEG_INF,
    TRANSPOSE,
    WARPGROUP_ROWS,
    accumulate,
    along_rows,
    empty_softmax,
    finish_softmax,
    iota,
    load,
    num_sms,
    online_softmax,
    params,
    product,
    store,
    tiles,
)
from kernels_pallas.page_size import PAGE
from kernels_pallas.tuning import tuned_config


class PageSplit(NamedTuple):
    """An even split of all sequences' pages over the blocks of the grid.

    Attributes:
      page_offsets: the number of pages of all sequences before each; the last entry is the number of all
        pages.
      pages_per_block: pages that each block reads.
      first_sequence: the sequence of each block's first page.
      num_sequences: the number of sequences in each block's run of pages.
    """

    page_offsets: Int32[Array, " S+1"]
    pages_per_block: Int32[Array, " 1"]
    first_sequence: Int32[Array, " blocks"]
    num_sequences: Int32[Array, " blocks"]


def split_pages(context_lens: Int32[Array, " S"], blocks: int) -> PageSplit:
    """Splits the sequences' pages evenly over the blocks."""
    pages = (context_lens + PAGE - 1) // PAGE
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(pages)]).astype(jnp.int32)
    total = offsets[-1]
    pages_per_block = jnp.maximum((total + blocks - 1) // blocks, 1)
    begin = jnp.minimum(jnp.arange(blocks, dtype=jnp.int32) * pages_per_block, total)
    end = jnp.minimum(begin + pages_per_block, total)
    first_sequence, last = (
        jnp.searchsorted(offsets[1:], page, side="right", method="compare_all").astype(jnp.int32)
        for page in (begin, jnp.maximum(end - 1, 0))
    )
    return PageSplit(offsets, pages_per_block[None], first_sequence, jnp.where(end > begin, last - first_sequence + 1, 0))


def decode(
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
    S, R, blocks = context_lens.shape[0], max_query_len * N, num_sms()
    config = tuned_config("hopper", "paged_attention_decode", S)
    context_lens = jnp.where(query_lens > 0, context_lens, 0)
    split = split_pages(context_lens, blocks)
    partials, ring = blocks + S, K * config.stages
    flat = (x.reshape(-1, K * H) for x in (keys, values))
    rows = jnp.pad(q, ((0, max_query_len - 1), (0, 0), (0, 0))).reshape(-1, H)
    read = plgpu.kernel(
        functools.partial(_read, N=N, K=K, H=H, R=R, stages=config.stages),
        out_type=[
            jax.ShapeDtypeStruct((partials, K, R, H), jnp.float32),
            jax.ShapeDtypeStruct((partials, K, WARPGROUP_ROWS), jnp.float32),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=K + 1,  # the last one only fetches
        thread_name="group",
        scratch_types=[
            tiles(WARPGROUP_ROWS, H),
            plgpu.RefUnion(tiles(ring, PAGE, H), plgpu.SMEM((ring, WARPGROUP_ROWS, H // 2), jnp.float32)),
            *(plgpu.Barrier(), plgpu.Barrier(num_arrivals=K)),
            *(plgpu.Barrier(num_barriers=ring), plgpu.Barrier(num_barriers=ring)),
        ],
        compiler_params=params(approximate=True),
        kernel_name="paged_attention_decode",
    )
    partial, weights = read(rows, *flat, block_tables, query_starts, query_lens, context_lens, *split)
    combine = plgpu.kernel(
        functools.partial(_combine, N=N, K=K, at_once=config.at_once),
        out_type=jax.ShapeDtypeStruct((S, R, H), q.dtype),
        grid=(S, R),
        grid_names=("sequence", "row"),
        compiler_params=params(approximate=True),
        kernel_name="paged_attention_join",
    )
    out = combine(partial, weights, split.page_offsets, split.pages_per_block).reshape(S, max_query_len, N, H)
    if max_query_len == 1 and T == S:
        return out.reshape(q.shape)
    within = jnp.arange(max_query_len, dtype=jnp.int32)[None]
    places = jnp.where(within < query_lens[:, None], query_starts[:, None] + within, T)
    return jnp.zeros_like(q).at[places].set(out, mode="drop")


def _read(*refs, N, K, H, R, stages):
    (
        q,
        keys,
        values,
        block_tables,
        query_starts,
        query_lens,
        context_lens,
        page_offsets,
        pages_per_block,
        first_sequence,
        num_sequences,
        partial,
        weights,
        *scratch,
    ) = refs
    q_s, (tile_s, out_s), q_ready, q_free, ready, free = scratch
    block, group = lax.axis_index("block"), lax.axis_index("group")
    begin, G = block * pages_per_block[0], N // K
    end = begin + pages_per_block[0]

    def pages_of(n):
        """Returns the block's n-th sequence, and the begin and end of its pages in the block.

        A resting row between two others has no pages.
        """
        s = first_sequence[block] + n
        offset = page_offsets[s]
        return s, jnp.maximum(begin - offset, 0), jnp.minimum(end, page_offsets[s + 1]) - offset

    @pl.when(group == K)
    def _fetch():
        plgpu.set_max_registers(40, action="decrease")

        def sequence(n, ring):
            s, low, high = pages_of(n)

            @pl.when(high > low)
            def _queries():
                pl.when(n > 0)(lambda: plgpu.barrier_wait(q_free))
                plgpu.copy_gmem_to_smem(q.at[pl.ds(query_starts[s] * N, R)], q_s.at[pl.ds(0, R)], q_ready)

            def page(i, t):
                rows = pl.ds(block_tables[s, i] * PAGE, PAGE)
                for source in (keys, values):
                    for head in range(K):
                        slot = head * stages + lax.rem(t, stages)
                        pl.when(t >= stages)(lambda slot=slot: plgpu.barrier_wait(free.at[slot]))
                        plgpu.copy_gmem_to_smem(source.at[rows, pl.ds(head * H, H)], tile_s.at[slot], ready.at[slot])
                    t = t + 1
                return t

            return lax.fori_loop(low, high, page, ring)

        lax.fori_loop(0, num_sequences[block], sequence, jnp.int32(0))

    @pl.when(group < K)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        scale = H**-0.5 * math.log2(math.e)
        token = iota((WARPGROUP_ROWS, PAGE), 0) // N

        def sequence(n, ring):
            s, low, high = pages_of(n)
            context, length = context_lens[s], query_lens[s]
            pl.when(high > low)(lambda: plgpu.barrier_wait(q_ready))

            def page(i, carry):
                total, weight, largest, t = carry
                slot = group * stages + lax.rem(t, stages)
                plgpu.barrier_wait(ready.at[slot])
                scores = product(q_s, tile_s.at[slot].transpose(TRANSPOSE))
                plgpu.barrier_arrive(free.at[slot])
                pl.when(i == high - 1)(lambda: plgpu.barrier_arrive(q_free))
                left = context - i * PAGE  # tokens from this page on

                def mask(x):
                    return jnp.where(iota((WARPGROUP_ROWS, PAGE), 1) < left - length + token + 1, x, -jnp.inf)

                scores = lax.cond(left - length < PAGE, mask, lambda x: x, scores)
                page_weights, decay, weight, largest = online_softmax(scores, weight, largest, scale)
                total = total * along_rows(decay, H)
                t = t + 1
                slot = group * stages + lax.rem(t, stages)
                plgpu.barrier_wait(ready.at[slot])
                pl.when(left < PAGE)(lambda: zero_rows(tile_s.at[slot], left))
                total = accumulate(total, page_weights.astype(q.dtype), tile_s.at[slot])
                pl.when(i < high - 1)(lambda: plgpu.barrier_arrive(free.at[slot]))
                return total, weight, largest, t + 1

            *sums, ring = lax.fori_loop(low, high, page, (*empty_softmax(H), ring))

            @pl.when(high > low)
            def _out():
                total, log = finish_softmax(*sums)
                # The last tile's buffer is not yet released: the result is copied through it in two halves.
                slot, index = group * stages + lax.rem(ring - 1, stages), block + s
                for half in range(2):
                    store(out_s.at[slot], lax.slice(total, (0, half * H // 2), (WARPGROUP_ROWS, (half + 1) * H // 2)))
                    plgpu.commit_smem()
                    for t in range(R // N):
                        mine = pl.ds(t * N + group * G, G)
                        columns = pl.ds(half * H // 2, H // 2)
                        plgpu.copy_smem_to_gmem(out_s.at[slot, mine], partial.at[index, group, mine, columns])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                weights[index, group] = log
                plgpu.barrier_arrive(free.at[slot])

            return ring

        lax.fori_loop(0, num_sequences[block], sequence, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def zero_rows(ref, valid):
    """Zeroes rows from `valid` on.

    Unwritten tokens may hold NaN, and zero times NaN is NaN.
    """
    rows, step = ref.shape[0], 64
    for c in range(0, ref.shape[1], step):
        some = ref.at[:, pl.ds(c, step)]
        some[...] = jnp.where(iota((rows, step), 0) < valid, some[...], jnp.zeros((), ref.dtype))
    plgpu.commit_smem()


def _combine(partial, weights, page_offsets, pages_per_block, out, *, N, K, at_once):
    """Combines the partial results of one row of a sequence.

    Each has the base-2 logarithm of its sum of weights.
    """
    s, row = lax.axis_index("sequence"), lax.axis_index("row")
    head = lax.rem(row, N) // (N // K)
    low, high = page_offsets[s], page_offsets[s + 1]
    first_block = low // pages_per_block[0]
    num_blocks = jnp.where(high > low, (high - 1) // pages_per_block[0] - first_block + 1, 0)
    width = out.shape[-1]
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=2)

    def add_partials(n, carry):
        total, weight, largest = carry
        indices = [first_block + s + n * at_once + i for i in range(at_once)]
        present = [n * at_once + i < num_blocks for i in range(at_once)]
        indices = [jnp.where(valid, index, first_block + s) for valid, index in zip(present, indices, strict=True)]
        logs = [jnp.where(valid, weights[index, head, row], NEG_INF) for valid, index in zip(present, indices, strict=True)]
        parts = [load(partial.at[index, head, row], layout) for index in indices]
        peak = functools.reduce(jnp.maximum, logs, largest)
        decay = jnp.exp2(largest - peak)
        factors = [jnp.exp2(x - peak) for x in logs]
        total = total * decay + sum(x * y for x, y in zip(parts, factors, strict=True))
        return total, weight * decay + sum(factors), peak

    zeros = plgpu.layout_cast(jnp.zeros(width, jnp.float32), layout)
    start = (zeros, jnp.float32(0), jnp.float32(NEG_INF))
    total, weight, _ = lax.fori_loop(0, (num_blocks + at_once - 1) // at_once, add_partials, start)
    scale = jnp.where(num_blocks > 0, 1 / jnp.where(weight > 0, weight, 1.0), 0.0)
    out[s, row] = (total * scale).astype(out.dtype)
