"""The gradient of `chunked` for Hopper, in three kernels with little around them:

1. `hand_back`: chunk after chunk of a sequence, last to first. The memory's cotangent stays in registers, float32, and is its own
   left operand, as the memory is on the way there (gpu_chunked.scan).
2. `chunk_gradients`: every chunk of every head on its own. The algebra is that of tpu_backward.chunk_backward, less the products
   that the forward kernels keep: sums over value channels with what a key or query reads become sums over keys of its cotangent.
3. `convolution_gradients`: every 64 tokens of 128 channels on their own.

Of a chunk with memory S before it and S' behind it, cotangents O of outputs and G of S', and what `gpu_chunked` names (writes n,
attention A, inverse T, right-hand side w, keys X scaled to the chunk's end, queries Q scaled to its start, fade f),

    d = A^T O + X G^T,    G_before = f G + O^T Q - d^T w,    r = T^T d,    v's cotangent: beta r.

Glossary: S sequences, T tokens, N heads, K key width, V value width, L tokens of a chunk, C channels, P snapshots.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.gated_delta.backward import chunk_rows, to_chunks, to_tokens
from kernels_pallas.gated_delta.gpu_chunked import (
    SLICE,
    TAIL,
    L,
    Memories,
    Solution,
    System,
    fetch_rows,
    inverse_length,
    put,
    send,
    with_last,
)
from kernels_pallas.gated_delta.packing import Chunks, chunk_table, snapshot_of_chunk
from kernels_pallas.gated_delta.reference import chunk_gates, gates
from kernels_pallas.gpu.mosaic import (
    ACROSS,
    COL,
    MATRIX,
    accumulate,
    along_columns,
    along_rows,
    iota,
    load,
    params,
    product,
    sigmoid,
    store,
    tiles,
)
from kernels_pallas.tuning import chosen

LANES = 128  # channels of a block of the convolution


def backward(
    qkv: Float[Array, "T C"],
    a: Float[Array, "T N"],
    b: Float[Array, "T N"],
    conv: Float[Array, "C W"],
    a_log: Float[Array, " N"],
    dt_bias: Float[Array, " N"],
    tail: Float[Array, "S tail C"],
    starts: Int32[Array, " S"],
    lengths: Int32[Array, " S"],
    snapshots: Int32[Array, "P 2"],
    kept: tuple[System, Solution, Memories],
    out_bar: Float[Array, "T N V"],
    ends_bar: Float32[Array, "S N V K"],
    kept_bar: Float32[Array, "P N V K"],
) -> tuple[Array, ...]:
    """Cotangents of `chunked`'s first eight arguments, from those of its results and what `gpu_chunked.forward` kept."""
    T, (system, solution, memories) = qkv.shape[0], kept
    table = chunk_table(starts, lengths, T)
    rows = chunk_rows(table, T)
    taken = snapshot_of_chunk(table, snapshots)
    _, beta = chunk_gates(a, b, a_log, dt_bias, table)
    out_bar = to_chunks(out_bar, rows).swapaxes(1, 2)
    read_bar = (out_bar.astype(jnp.float32) * system.q_scale.swapaxes(0, 1)[..., None]).astype(qkv.dtype)
    kept_bar = jnp.pad(kept_bar, ((0, 1), (0, 0), (0, 0), (0, 0)))  # a kernel takes no empty array
    cotangents, memory_bar = hand_back(system, out_bar, read_bar, ends_bar, kept_bar, lengths, taken)
    bars = chunk_gradients(system, solution, memories, cotangents, out_bar, beta.transpose(2, 0, 1), table)

    # A decay counts in all cumulated ones from its token to the chunk's end.
    g_bar = jnp.cumsum(bars.decay.sum(axis=2)[..., ::-1], axis=-1)[..., ::-1] + bars.whole.sum(axis=-1, keepdims=True)
    gates_bar = (to_tokens(x.transpose(1, 2, 0), rows, T)[None] for x in (g_bar, bars.beta.sum(axis=2)))
    _, pull_gates = jax.vjp(lambda a, b, *layer: gates(a[None], b[None], *layer), a, b, a_log, dt_bias)
    a_bar, b_bar, a_log_bar, dt_bias_bar = pull_gates(tuple(gates_bar))
    qkv_bar, conv_bar, tail_bar = convolution_gradients(qkv, conv, tail, bars.qkv, table, starts, lengths)
    return qkv_bar, a_bar, b_bar, conv_bar, a_log_bar, dt_bias_bar, memory_bar, tail_bar


class Cotangents(NamedTuple):
    """What `hand_back` finds out about each chunk.

    Attributes:
      after: of the memory after it.
      writes: of each token's write, transposed.
    """

    after: Float[Array, "chunks N V K"]
    writes: Float[Array, "chunks N V L"]


def hand_back(
    system: System,
    out_bar: Float[Array, "chunks N L V"],
    read_bar: Float[Array, "chunks N L V"],
    ends_bar: Float32[Array, "S N V K"],
    kept_bar: Float32[Array, "P N V K"],
    lengths: Int32[Array, " S"],
    taken: Int32[Array, " chunks"],
) -> tuple[Cotangents, Float32[Array, "S N V K"]]:
    """Cotangents of what is handed from chunk to chunk, and of the memory before each sequence.

    Args:
      out_bar: cotangents of the outputs; zeros where a chunk has no token.
      read_bar: the same times `system.q_scale`, of what is read from the memory before the chunk.
      ends_bar, kept_bar: cotangents of the memory after each sequence, and of snapshots (P at least 1).
      taken: which snapshot each chunk's end is, or -1.
    """
    (S, N, V, K), chunks, dtype = ends_bar.shape, taken.shape[0], out_bar.dtype
    cut = chosen("gpu", "gated_delta_hand_back", S * N)
    groups, stages = cut.groups, cut.stages
    kernel = plgpu.kernel(
        functools.partial(_hand_back, groups=groups, stages=stages),
        out_type=(
            Cotangents(jax.ShapeDtypeStruct((chunks, N, V, K), dtype), jax.ShapeDtypeStruct((chunks, N, V, L), dtype)),
            jax.ShapeDtypeStruct(ends_bar.shape, jnp.float32),
        ),
        grid=(S, N, V // SLICE // groups),
        grid_names=("sequence", "head", "block"),
        num_threads=groups + 1,  # the last only fetches
        thread_name="group",
        scratch_types=[
            [
                *(tiles(stages, L, K), tiles(stages, L, K), tiles(stages, L, K)),  # q, k, w
                *(tiles(stages, L, L), plgpu.SMEM((stages, L), jnp.float32)),  # attention, k_scale
            ],
            [tiles(stages * groups, L, SLICE), tiles(stages * groups, L, SLICE)],  # out_bar, read_bar
            Cotangents(tiles(groups, SLICE, K), tiles(groups, SLICE, L)),  # on their way to device memory
            plgpu.Barrier(num_arrivals=5 + 2 * groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        ],
        compiler_params=params(approximate=True),
        kernel_name="gated_delta_hand_back_chunks",
    )
    counts = (lengths + L - 1) // L
    shared = (system.q, system.k, system.w, system.attention)
    return kernel(
        shared, system.k_scale, out_bar, read_bar, system.decay, ends_bar, kept_bar, jnp.cumsum(counts) - counts, counts, taken
    )


def _hand_back(*refs, groups, stages):
    shared, k_scale, out_bar, read_bar, decay, ends_bar, kept_bar, first, counts, taken, sent, memory_bar, *scratch = refs
    (*shared_s, k_scale_s), own_s, sent_s, ready, consumed = scratch
    q_s, k_s, w_s, att_s = shared_s
    sequence, head, block, group = (lax.axis_index(name) for name in ("sequence", "head", "block", "group"))
    count, last = counts[sequence], first[sequence] + counts[sequence] - 1

    @pl.when(group == groups)
    def _fetch():
        plgpu.set_max_registers(88, action="decrease")

        @pl.loop(0, count)
        def _(i):
            slot, chunk = lax.rem(i, stages), last - i
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
            for source, place in zip(shared, shared_s, strict=True):
                plgpu.copy_gmem_to_smem(source.at[chunk, head], place.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(k_scale.at[head, chunk], k_scale_s.at[slot], ready.at[slot])
            for source, place in zip((out_bar, read_bar), own_s, strict=True):
                for g in range(groups):
                    columns = source.at[chunk, head, :, pl.ds((block * groups + g) * SLICE, SLICE)]
                    plgpu.copy_gmem_to_smem(columns, place.at[slot * groups + g], ready.at[slot])

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(208, action="increase")
        mine = pl.ds((block * groups + group) * SLICE, SLICE)

        def hand_back(i, state):
            slot, chunk = lax.rem(i, stages), last - i
            fade, snapshot = jnp.exp(decay[head, chunk, L - 1]), taken[chunk]
            state = lax.cond(
                snapshot >= 0, lambda x: x + load(kept_bar.at[jnp.maximum(snapshot, 0), head, mine], MATRIX), lambda x: x, state
            )
            plgpu.barrier_wait(ready.at[slot])
            out_s, read_s = (place.at[slot * groups + group].transpose(ACROSS) for place in own_s)
            after = state.astype(sent_s.after.dtype)
            writes = product(after, k_s.at[slot].transpose(ACROSS)) * along_columns(load(k_scale_s.at[slot], COL), SLICE)
            writes = accumulate(writes, out_s, att_s.at[slot])
            added = writes.astype(after.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for x, place, destination in zip((after, added), sent_s, sent, strict=True):
                send(x, place.at[group], destination.at[chunk, head, mine])
            state = accumulate(state * fade, read_s, q_s.at[slot])
            state = accumulate(state, (-writes).astype(after.dtype), w_s.at[slot])
            plgpu.barrier_arrive(consumed.at[slot])
            return state

        state = load(ends_bar.at[sequence, head, mine], MATRIX)
        memory_bar[sequence, head, mine] = lax.fori_loop(0, count, hand_back, state)
        plgpu.wait_smem_to_gmem(0)


class Gradients(NamedTuple):
    """Cotangents that `chunk_gradients` gives; sums of two parts, which two warpgroups find.

    Attributes:
      qkv: of queries, keys and values after the convolution, chunk by chunk.
      decay: of the cumulated log decay, less `whole`.
      beta: of the writing strengths.
      whole: what is to be added to the cotangent of the chunk's last decay, in 64 parts.
    """

    qkv: Float[Array, "chunks L C"]
    decay: Float32[Array, "N chunks parts L"]
    beta: Float32[Array, "N chunks parts L"]
    whole: Float32[Array, "N chunks L"]


def chunk_gradients(
    system: System,
    solution: Solution,
    memories: Memories,
    cotangents: Cotangents,
    out_bar: Float[Array, "chunks N L V"],
    beta: Float32[Array, "N chunks L"],
    table: Chunks,
) -> Gradients:
    """Through the chunks' systems and the normalisation of queries and keys."""
    (chunks, N, _, K), V = system.q.shape, out_bar.shape[-1]
    parts = jax.ShapeDtypeStruct((N, chunks, 2, L), jnp.float32)
    whole = jax.ShapeDtypeStruct((N, chunks, L), jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_chunk_gradients, N=N, K=K),
        out_type=[Gradients(jax.ShapeDtypeStruct((chunks, L, 3 * N * K), out_bar.dtype), parts, parts, whole)],
        grid=(chunks, N),
        grid_names=("chunk", "head"),
        num_threads=2,
        thread_name="group",
        scratch_types=[
            # Inverse, v, and cotangents of writes; where these were, the keys' part of another warpgroup.
            [tiles(L, L), tiles(L, V), plgpu.RefUnion(tiles(V, L), tiles(L, K))],
            [tiles(V, L), tiles(L, K), tiles(L, K), tiles(L, V), tiles(L, L)],  # writes, q, k, out_bar, attention
            [tiles(V, K), tiles(V, K)],  # memory before and cotangent of that after
            plgpu.SMEM((L, L + 8), jnp.float32),  # pairs, on their way to the other warpgroup
            plgpu.SMEM((3, L), jnp.float32),  # vectors on their way from rows to columns and back
            [plgpu.Barrier(num_arrivals=arrivals) for arrivals in (3, 5, 2)],
            [plgpu.Barrier(num_arrivals=arrivals) for arrivals in (2, 1, 1)],
        ],
        compiler_params=params(approximate=True),
        kernel_name="gated_delta_chunk_gradients",
    )
    inputs = [
        [solution.inverse, solution.v, cotangents.writes],
        [memories.writes, system.q, system.k, out_bar, system.attention],
        [memories.before, cotangents.after],
    ]
    (bars,) = kernel(inputs, (system.q_scale, system.k_scale, system.decay, beta), table.rows)
    return bars


def _chunk_gradients(*refs, N, K):
    """One warpgroup finds cotangents of values and queries, the other of keys; each begins with what both need."""
    inputs, vectors, rows, bars, *places, pairs_s, vectors_s, ready, met = refs
    (inverse_s, v_s, (d_s, keys_s)), (n_s, q_s, k_s, o_s, att_s), (before_s, after_s) = places
    solved_by_both, attended, written_down = met
    chunk, head, group = (lax.axis_index(name) for name in ("chunk", "head", "group"))
    pairs_s = pairs_s.at[:, pl.ds(0, L)]

    def fetch():
        for sources, some, arrived in zip(inputs, ([inverse_s, v_s, d_s], *places[1:]), ready, strict=True):
            for source, place in zip(sources, some, strict=True):
                plgpu.copy_gmem_to_smem(source.at[chunk, head], place, arrived)

    def leave(x, part, place):
        """A part's cotangent to device memory by way of shared memory."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        send(x, place, bars.qkv.at[chunk, :, pl.ds((part * N + head) * K, K)])

    def fading():
        """Decay from each token to each later one, by the length of the key of the earlier; and that length, along rows."""
        decay, k_norm = load(vectors[2].at[head, chunk]), inverse_length(k_s)
        store(vectors_s.at[group], k_norm)
        decay_col, norm_col = (along_columns(load(x, COL), L) for x in (vectors[2].at[head, chunk], vectors_s.at[group]))
        return jnp.exp(jnp.minimum(along_rows(decay, L) - decay_col, 0.0)) * norm_col, k_norm

    @pl.when((rows[chunk] > 0) & (group == 0))
    def _values_and_queries():
        fetch()
        q_scale, k_scale, _, beta = (load(x.at[head, chunk]) for x in vectors)
        plgpu.barrier_wait(ready[0])
        right = product(inverse_s.transpose(ACROSS), d_s.transpose(ACROSS))
        plgpu.barrier_arrive(solved_by_both)
        bars.beta[head, chunk, 0] = _dots(right, v_s)
        leave(right * along_rows(beta, K), 2, v_s)

        plgpu.barrier_wait(ready[1])
        between, _ = fading()
        i, j, q_norm = iota((L, L), 0), iota((L, L), 1), inverse_length(q_s)
        seen = product(o_s, n_s)
        store(pairs_s, jnp.where(i > j, seen * att_s[...].astype(jnp.float32), 0.0))
        put(jnp.where(i >= j, seen * between * along_rows(q_norm * K**-0.5, L), 0.0), att_s)
        plgpu.barrier_arrive(attended)

        plgpu.barrier_wait(ready[2])
        written = product(n_s.transpose(ACROSS), after_s) * along_rows(k_scale, K)
        into = _dots(written, k_s)
        plgpu.barrier_wait(solved_by_both)
        put(written, keys_s)
        plgpu.barrier_arrive(written_down)
        q_bar = product(o_s, before_s) * along_rows(q_scale, K)
        bars.decay[head, chunk, 0] = _dots(q_bar, q_s) - into
        leave(_through_norm(accumulate(q_bar, att_s, k_s), q_s, q_norm), 0, v_s)
        halves = (pl.ds(0, L), pl.ds(L, L))
        kept = sum(_dots(before_s.at[h][...].astype(jnp.float32), after_s.at[h]) for h in halves)
        bars.whole[head, chunk] = into + kept * jnp.exp(vectors[2][head, chunk, L - 1])
        plgpu.wait_smem_to_gmem(0)

    @pl.when((rows[chunk] > 0) & (group == 1))
    def _keys():
        decay, beta = (load(x.at[head, chunk]) for x in vectors[2:])
        plgpu.barrier_wait(ready[0])
        solved = product(inverse_s.transpose(ACROSS), d_s.transpose(ACROSS)).astype(k_s.dtype)
        plgpu.barrier_arrive(solved_by_both)

        plgpu.barrier_wait(ready[1])
        between, k_norm = fading()
        i, j = iota((L, L), 0), iota((L, L), 1)
        overlap_bar = jnp.where(i > j, -product(solved, n_s), 0.0) * between * along_rows(k_norm, L)
        plgpu.barrier_wait(solved_by_both)
        put(overlap_bar * along_rows(beta, L), inverse_s)
        overlap_bar = overlap_bar * product(k_s, k_s.transpose(ACROSS))
        strength = jnp.sum(overlap_bar, axis=1)
        plgpu.barrier_wait(attended)
        pairs = overlap_bar * along_rows(beta, L) + load(pairs_s, MATRIX)
        store(vectors_s.at[2], jnp.sum(pairs, axis=0))
        slope = jnp.sum(pairs, axis=1) - load(vectors_s.at[2])

        plgpu.barrier_wait(ready[2])
        k_bar = product(solved, before_s)
        read = _dots(k_bar, k_s) * k_norm * jnp.exp(decay)
        bars.beta[head, chunk, 1] = strength - read
        bars.decay[head, chunk, 1] = slope - beta * read
        k_bar = k_bar * along_rows(-beta * jnp.exp(decay) * k_norm, K)
        for x, y in ((inverse_s, k_s), (inverse_s.transpose(ACROSS), k_s), (att_s.transpose(ACROSS), q_s)):
            k_bar = accumulate(k_bar, x, y)
        plgpu.barrier_wait(written_down)
        k_bar = k_bar + keys_s[...].astype(jnp.float32)
        leave(_through_norm(k_bar, k_s, k_norm), 1, keys_s)
        plgpu.wait_smem_to_gmem(0)


def _dots(x, ref):
    """Row by row; what is in shared memory is better read again than kept in registers."""
    return jnp.sum(x * ref[...].astype(jnp.float32), axis=1)


def _through_norm(bar, ref, inverse_length):
    """The cotangent of `x` from that of `x / |x|`, divided by `|x|` already."""
    length = _dots(bar, ref) * inverse_length * inverse_length
    return bar - ref[...].astype(jnp.float32) * along_rows(length, bar.shape[1])


FRONT = 8  # rows before a chunk's first in shared memory, of which the convolution sees three
BEHIND = 8  # rows behind its last, of which three see it
STEP = 16  # rows in registers at a time
# A thread has 4 neighbouring channels of a row, a warp a whole row.
BY_ROWS = plgpu.Layout.TILED(plgpu.Tiling(((4, LANES), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def convolution_gradients(
    qkv: Float[Array, "T C"],
    conv: Float[Array, "C W"],
    tail: Float[Array, "S tail C"],
    bars: Float[Array, "chunks L C"],
    table: Chunks,
    starts: Int32[Array, " S"],
    lengths: Int32[Array, " S"],
) -> tuple[Float[Array, "T C"], Float[Array, "C W"], Float[Array, "S tail C"]]:
    """Through SiLU and the convolution, of which nothing was kept: cotangents of `qkv`, `conv` and `tail`.

    Args:
      bars: cotangents of what the convolution gave, chunk by chunk.
    """
    (T, C), (S, _, _), (chunks, W) = qkv.shape, tail.shape, (bars.shape[0], conv.shape[1])
    own = jnp.minimum(table.sequence, S - 1)
    there = jnp.where(table.rows > 0, jnp.minimum(lengths[own] - L * table.index, L + TAIL), 0)  # rows that count
    kernel = plgpu.kernel(
        functools.partial(_convolution_gradients, W=W),
        out_type=(
            jax.ShapeDtypeStruct((T, C), qkv.dtype),
            jax.ShapeDtypeStruct((S, L, C), qkv.dtype),
            jax.ShapeDtypeStruct((chunks, W, C), jnp.float32),
            jax.ShapeDtypeStruct((S, FRONT, C), tail.dtype),
        ),
        grid=(chunks, C // LANES),
        grid_names=("chunk", "part"),
        scratch_types=[
            plgpu.SMEM((FRONT + L + BEHIND, LANES), qkv.dtype),  # inputs
            plgpu.SMEM((L + BEHIND, LANES), qkv.dtype),  # cotangents behind SiLU, and before it
            plgpu.SMEM((FRONT + L + BEHIND, LANES), jnp.float32),
            plgpu.Barrier(num_arrivals=4),
        ],
        compiler_params=params(approximate=True, reduction_scratch_bytes=4096),
        kernel_name="gated_delta_convolution_gradients",
    )
    qkv_bar, last, taps, fronts = kernel(qkv, conv.T, tail, bars, own, table.row, table.index, there)
    row = jnp.arange(T, dtype=jnp.int32)
    owned = jnp.any((row[None] >= starts[:, None]) & (row[None] < (starts + lengths)[:, None]), axis=0)
    qkv_bar = with_last(qkv_bar, last, starts, lengths).at[jnp.where(owned, T, row)].set(0, mode="drop")
    tail_bar = jnp.where((lengths > 0)[:, None, None], fronts[:, FRONT - TAIL :], jnp.zeros((), tail.dtype))
    return qkv_bar, taps.sum(axis=0).T.astype(conv.dtype), tail_bar


def _convolution_gradients(*refs, W):
    qkv, conv, tail, bars, sequence, row, index, there, out, last, taps_bar, fronts, raw_s, bar_s, linear_s, ready = refs
    chunk, part = lax.axis_index("chunk"), lax.axis_index("part")
    run, real = pl.ds(part * LANES, LANES), there[chunk]

    @pl.when(real == 0)
    def _():
        for i in range(W):
            taps_bar[chunk, i, run] = jnp.zeros(LANES, jnp.float32)

    @pl.when(real > 0)
    def _():
        before, place = raw_s.at[pl.ds(FRONT - TAIL, TAIL)], raw_s.at[pl.ds(FRONT, L + BEHIND)]
        fetch_rows(qkv, tail, run, before, place, ready, row[chunk], index[chunk], sequence[chunk])
        plgpu.copy_gmem_to_smem(bars.at[chunk, :, run], bar_s.at[pl.ds(0, L)], ready)
        following = jnp.minimum(chunk + 1, bars.shape[0] - 1)
        plgpu.copy_gmem_to_smem(bars.at[following, pl.ds(0, BEHIND), run], bar_s.at[pl.ds(L, BEHIND)], ready)
        taps = [load(conv.at[i, run], BY_ROWS.reduce(0)).astype(jnp.float32) for i in range(W)]

        def spread(tap, count):
            return plgpu.layout_cast(along_columns(tap, count), BY_ROWS)

        def zeros(count):
            return plgpu.layout_cast(jnp.zeros((count, LANES), jnp.float32), BY_ROWS)

        linear_s[pl.ds(0, FRONT)] = zeros(FRONT)
        plgpu.barrier_wait(ready)
        products = [zeros(STEP)] * W  # for each tap's cotangent
        for first, count in (*((i, STEP) for i in range(0, L, STEP)), (L, BEHIND)):
            x = [load(raw_s.at[pl.ds(FRONT - TAIL + first + i, count)], BY_ROWS).astype(jnp.float32) for i in range(W)]
            linear = sum(value * spread(tap, count) for value, tap in zip(x, taps, strict=True))
            share = sigmoid(linear)
            bar = load(bar_s.at[pl.ds(first, count)], BY_ROWS).astype(jnp.float32) * share * (1 + linear * (1 - share))
            rows = plgpu.broadcasted_iota(jnp.int32, (count, LANES), 0, layout=BY_ROWS) + first
            store(linear_s.at[pl.ds(FRONT + first, count)], jnp.where(rows < real, bar, 0.0))
            if first < L:
                products = [total + jnp.where(rows < real, bar * value, 0.0) for total, value in zip(products, x, strict=True)]
        for i, total in enumerate(products):
            store(taps_bar.at[chunk, i, run], jnp.sum(total, axis=0))

        def through(first, count):
            behind = (load(linear_s.at[pl.ds(FRONT + first + back, count)], BY_ROWS) for back in range(W))
            return sum(bar * spread(taps[W - 1 - back], count) for back, bar in enumerate(behind))

        @pl.when(real >= L)
        def _():
            for first in range(0, L, STEP):
                store(out.at[pl.ds(row[chunk] + first, STEP), run], through(first, STEP).astype(out.dtype))

        @pl.when(real < L)
        def _():
            for first in range(0, L, STEP):
                store(last.at[sequence[chunk], pl.ds(first, STEP), run], through(first, STEP).astype(out.dtype))

        @pl.when(index[chunk] == 0)
        def _():
            store(fronts.at[sequence[chunk], :, run], through(-FRONT, FRONT).astype(fronts.dtype))
