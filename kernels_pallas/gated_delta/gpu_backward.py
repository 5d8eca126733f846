"""Backward pass of `chunked` for Hopper, as three kernels with little XLA around them.

1. `scan_backward` walks the chunks of a sequence from last to first. The state's cotangent stays in
   registers, in float32, and is the left operand of its products, like the state in gpu_chunked.scan.
2. `chunk_gradients` handles every chunk of every head on its own. Its algebra is that of
   tpu_backward.chunk_backward, without the products that the forward kernels save. Sums over value channels
   with a key's or query's read become sums over keys with the read's cotangent.
3. `convolution_gradients` handles every 64 tokens of 128 channels on their own.

Let a chunk have state S before it and S' after it, and cotangents O of its outputs and G of S'. In the terms
of `gpu_chunked` (writes n, attention A, inverse T, right-hand side w, keys X scaled to the chunk's end,
queries Q scaled to its start, fade f):

    d = A^T O + X G^T,    G_before = f G + O^T Q - d^T w,    r = T^T d,    v's cotangent: beta r.

Glossary: S sequences, T tokens, N heads, K key width, V value width, L tokens of a chunk, C channels,
P snapshots.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.gated_delta.arguments import ChunkedArguments
from kernels_pallas.gated_delta.backward import chunk_rows, to_chunks, to_tokens
from kernels_pallas.gated_delta.gpu_chunked import (
    CONV_HISTORY,
    SLICE,
    ChunkTerms,
    L,
    PrepareResiduals,
    ScanResiduals,
    fetch_rows,
    inverse_norm,
    scatter_partial_chunks,
    store_global,
    store_shared,
)
from kernels_pallas.gated_delta.packing import Chunks, chunk_table, snapshot_of_chunk
from kernels_pallas.gated_delta.reference import chunk_gates, gates
from kernels_pallas.gpu.mosaic import (
    COL,
    MATRIX,
    TRANSPOSE,
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
from kernels_pallas.tuning import tuned_config

LANES = 128  # channels of a block of the convolution


def backward(
    arguments: ChunkedArguments,
    saved: tuple[ChunkTerms, PrepareResiduals, ScanResiduals],
    d_out: Float[Array, "T N V"],
    d_final_states: Float32[Array, "S N V K"],
    d_snapshots: Float32[Array, "P N V K"],
) -> ChunkedArguments:
    """Returns cotangents of `chunked`'s arguments; None for integers.

    Args:
      saved: residuals that `gpu_chunked.forward` returned.
      d_out, d_final_states, d_snapshots: cotangents of the results of `chunked`.
    """
    qkv, a, b, conv, a_log, dt_bias, _, conv_state, query_starts, query_lens, snapshots = arguments
    T, (terms, residuals, scan_residuals) = qkv.shape[0], saved
    table = chunk_table(query_starts, query_lens, T)
    rows = chunk_rows(table, T)
    chunk_snapshots = snapshot_of_chunk(table, snapshots)
    _, beta = chunk_gates(a, b, a_log, dt_bias, table)
    d_out = to_chunks(d_out, rows).swapaxes(1, 2)
    d_read = (d_out.astype(jnp.float32) * terms.q_scale.swapaxes(0, 1)[..., None]).astype(qkv.dtype)
    d_snapshots = jnp.pad(d_snapshots, ((0, 1), (0, 0), (0, 0), (0, 0)))  # kernels do not accept empty arrays
    scan_grads, d_recurrent_state = scan_backward(terms, d_out, d_read, d_final_states, d_snapshots, query_lens, chunk_snapshots)
    grads = chunk_gradients(terms, residuals, scan_residuals, scan_grads, d_out, beta.transpose(2, 0, 1), table)

    # A token's decay is part of every cumulative decay from its token to the chunk's end.
    d_g = jnp.cumsum(grads.d_decay.sum(axis=2)[..., ::-1], axis=-1)[..., ::-1] + grads.d_last_decay.sum(axis=-1, keepdims=True)
    d_gates = (to_tokens(x.transpose(1, 2, 0), rows, T)[None] for x in (d_g, grads.d_beta.sum(axis=2)))
    _, pull_gates = jax.vjp(lambda a, b, *layer: gates(a[None], b[None], *layer), a, b, a_log, dt_bias)
    d_a, d_b, d_a_log, d_dt_bias = pull_gates(tuple(d_gates))
    d_qkv, d_conv, d_conv_state = convolution_gradients(qkv, conv, conv_state, grads.d_qkv, table, query_starts, query_lens)
    return ChunkedArguments(d_qkv, d_a, d_b, d_conv, d_a_log, d_dt_bias, d_recurrent_state, d_conv_state, None, None, None)


class ScanGradients(NamedTuple):
    """Cotangents of each chunk that `scan_backward` computes.

    Attributes:
      d_states: of the state after the chunk.
      d_writes: of each token's write, transposed.
    """

    d_states: Float[Array, "chunks N V K"]
    d_writes: Float[Array, "chunks N V L"]


def scan_backward(
    terms: ChunkTerms,
    d_out: Float[Array, "chunks N L V"],
    d_read: Float[Array, "chunks N L V"],
    d_final_states: Float32[Array, "S N V K"],
    d_snapshots: Float32[Array, "P N V K"],
    query_lens: Int32[Array, " S"],
    chunk_snapshots: Int32[Array, " chunks"],
) -> tuple[ScanGradients, Float32[Array, "S N V K"]]:
    """Returns the cotangents of each chunk's state and writes, and of the state before each sequence.

    Args:
      d_out: cotangents of the outputs; zeros where a chunk has no token.
      d_read: `d_out * terms.q_scale`, the cotangents of reads from the state before the chunk.
      d_final_states: cotangents of the state after each sequence.
      d_snapshots: cotangents of snapshots, at least one.
      chunk_snapshots: index of the snapshot taken at each chunk's end, or -1.
    """
    (S, N, V, K), chunks, dtype = d_final_states.shape, chunk_snapshots.shape[0], d_out.dtype
    config = tuned_config("hopper", "gated_delta_scan_backward", S * N)
    groups, stages = config.groups, config.stages
    kernel = plgpu.kernel(
        functools.partial(_scan_backward, groups=groups, stages=stages),
        out_type=(
            ScanGradients(jax.ShapeDtypeStruct((chunks, N, V, K), dtype), jax.ShapeDtypeStruct((chunks, N, V, L), dtype)),
            jax.ShapeDtypeStruct(d_final_states.shape, jnp.float32),
        ),
        grid=(S, N, V // SLICE // groups),
        grid_names=("sequence", "head", "block"),
        num_threads=groups + 1,  # the last one only issues copies
        thread_name="group",
        scratch_types=[
            [
                *(tiles(stages, L, K), tiles(stages, L, K), tiles(stages, L, K)),  # q, k, w
                *(tiles(stages, L, L), plgpu.SMEM((stages, L), jnp.float32)),  # attention, k_scale
            ],
            [tiles(stages * groups, L, SLICE), tiles(stages * groups, L, SLICE)],  # out_bar, read_bar
            ScanGradients(tiles(groups, SLICE, K), tiles(groups, SLICE, L)),  # staging for device memory
            plgpu.Barrier(num_arrivals=5 + 2 * groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        ],
        compiler_params=params(approximate=True),
        kernel_name="gated_delta_scan_backward",
    )
    num_chunks = (query_lens + L - 1) // L
    shared = (terms.q, terms.k, terms.w, terms.attention)
    return kernel(
        shared,
        terms.k_scale,
        d_out,
        d_read,
        terms.decay,
        d_final_states,
        d_snapshots,
        jnp.cumsum(num_chunks) - num_chunks,
        num_chunks,
        chunk_snapshots,
    )


def _scan_backward(*refs, groups, stages):
    (
        shared,
        k_scale,
        d_out,
        d_read,
        decay,
        d_final_states,
        d_snapshots,
        first_chunk,
        num_chunks,
        chunk_snapshots,
        sent,
        d_recurrent_state,
        *scratch,
    ) = refs
    (*shared_s, k_scale_s), own_s, sent_s, ready, consumed = scratch
    q_s, k_s, w_s, att_s = shared_s
    sequence, head, block, group = (lax.axis_index(name) for name in ("sequence", "head", "block", "group"))
    count, partial = num_chunks[sequence], first_chunk[sequence] + num_chunks[sequence] - 1

    @pl.when(group == groups)
    def _fetch():
        plgpu.set_max_registers(88, action="decrease")

        @pl.loop(0, count)
        def _(i):
            slot, chunk = lax.rem(i, stages), partial - i
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
            for source, dst in zip(shared, shared_s, strict=True):
                plgpu.copy_gmem_to_smem(source.at[chunk, head], dst.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(k_scale.at[head, chunk], k_scale_s.at[slot], ready.at[slot])
            for source, dst in zip((d_out, d_read), own_s, strict=True):
                for g in range(groups):
                    columns = source.at[chunk, head, :, pl.ds((block * groups + g) * SLICE, SLICE)]
                    plgpu.copy_gmem_to_smem(columns, dst.at[slot * groups + g], ready.at[slot])

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(208, action="increase")
        own_channels = pl.ds((block * groups + group) * SLICE, SLICE)

        def scan_backward(i, state):
            slot, chunk = lax.rem(i, stages), partial - i
            fade, snapshot = jnp.exp(decay[head, chunk, L - 1]), chunk_snapshots[chunk]
            state = lax.cond(
                snapshot >= 0,
                lambda x: x + load(d_snapshots.at[jnp.maximum(snapshot, 0), head, own_channels], MATRIX),
                lambda x: x,
                state,
            )
            plgpu.barrier_wait(ready.at[slot])
            out_s, read_s = (dst.at[slot * groups + group].transpose(TRANSPOSE) for dst in own_s)
            after = state.astype(sent_s.d_states.dtype)
            writes = product(after, k_s.at[slot].transpose(TRANSPOSE)) * along_columns(load(k_scale_s.at[slot], COL), SLICE)
            writes = accumulate(writes, out_s, att_s.at[slot])
            d_new = writes.astype(after.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for x, dst, destination in zip((after, d_new), sent_s, sent, strict=True):
                store_global(x, dst.at[group], destination.at[chunk, head, own_channels])
            state = accumulate(state * fade, read_s, q_s.at[slot])
            state = accumulate(state, (-writes).astype(after.dtype), w_s.at[slot])
            plgpu.barrier_arrive(consumed.at[slot])
            return state

        state = load(d_final_states.at[sequence, head, own_channels], MATRIX)
        d_recurrent_state[sequence, head, own_channels] = lax.fori_loop(0, count, scan_backward, state)
        plgpu.wait_smem_to_gmem(0)


class ChunkGradients(NamedTuple):
    """Cotangents that `chunk_gradients` computes. Two warpgroups each compute one of two summands ("parts").

    Attributes:
      d_qkv: of queries, keys and values after the convolution, chunk by chunk.
      d_decay: of the cumulative log decay, without `d_last_decay`.
      d_beta: of the writing strengths.
      d_last_decay: 64 summands to add to the cotangent of the chunk's last decay.
    """

    d_qkv: Float[Array, "chunks L C"]
    d_decay: Float32[Array, "N chunks parts L"]
    d_beta: Float32[Array, "N chunks parts L"]
    d_last_decay: Float32[Array, "N chunks L"]


def chunk_gradients(
    terms: ChunkTerms,
    residuals: PrepareResiduals,
    scan_residuals: ScanResiduals,
    scan_grads: ScanGradients,
    d_out: Float[Array, "chunks N L V"],
    beta: Float32[Array, "N chunks L"],
    table: Chunks,
) -> ChunkGradients:
    """Propagates cotangents through the chunks' systems and the normalisation of queries and keys."""
    (chunks, N, _, K), V = terms.q.shape, d_out.shape[-1]
    parts = jax.ShapeDtypeStruct((N, chunks, 2, L), jnp.float32)
    one_part = jax.ShapeDtypeStruct((N, chunks, L), jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_chunk_gradients, N=N, K=K),
        out_type=[ChunkGradients(jax.ShapeDtypeStruct((chunks, L, 3 * N * K), d_out.dtype), parts, parts, one_part)],
        grid=(chunks, N),
        grid_names=("chunk", "head"),
        num_threads=2,
        thread_name="group",
        scratch_types=[
            # Inverse, v, and cotangents of writes, whose buffer is reused for d_k's other summand.
            [tiles(L, L), tiles(L, V), plgpu.RefUnion(tiles(V, L), tiles(L, K))],
            [tiles(V, L), tiles(L, K), tiles(L, K), tiles(L, V), tiles(L, L)],  # writes, q, k, out_bar, attention
            [tiles(V, K), tiles(V, K)],  # state before the chunk, cotangent of the state after it
            plgpu.SMEM((L, L + 8), jnp.float32),  # pairs, for the other warpgroup
            plgpu.SMEM((3, L), jnp.float32),  # vectors, to change between ROW and COL layout
            [plgpu.Barrier(num_arrivals=arrivals) for arrivals in (3, 5, 2)],
            [plgpu.Barrier(num_arrivals=arrivals) for arrivals in (2, 1, 1)],
        ],
        compiler_params=params(approximate=True),
        kernel_name="gated_delta_chunk_gradients",
    )
    inputs = [
        [residuals.inverse, residuals.v, scan_grads.d_writes],
        [scan_residuals.writes, terms.q, terms.k, d_out, terms.attention],
        [scan_residuals.states, scan_grads.d_states],
    ]
    (grads,) = kernel(inputs, (terms.q_scale, terms.k_scale, terms.decay, beta), table.num_tokens)
    return grads


def _chunk_gradients(*refs, N, K):
    """Computes cotangents of values and queries in one warpgroup and of keys in the other.

    Both begin with the intermediate results that both need.
    """
    inputs, vectors, num_tokens, grads, *buffers, pairs_s, vectors_s, ready, meeting = refs
    (inverse_s, v_s, (d_s, keys_s)), (n_s, q_s, k_s, o_s, att_s), (before_s, after_s) = buffers
    solved_by_both, attended, written_down = meeting
    chunk, head, group = (lax.axis_index(name) for name in ("chunk", "head", "group"))
    pairs_s = pairs_s.at[:, pl.ds(0, L)]

    def fetch():
        for sources, some, arrived in zip(inputs, ([inverse_s, v_s, d_s], *buffers[1:]), ready, strict=True):
            for source, dst in zip(sources, some, strict=True):
                plgpu.copy_gmem_to_smem(source.at[chunk, head], dst, arrived)

    def store_part(x, part, dst):
        """Stores one part's cotangent in device memory through shared memory."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        store_global(x, dst, grads.d_qkv.at[chunk, :, pl.ds((part * N + head) * K, K)])

    def decay_matrix():
        """Returns decay times inverse key norm, [L, L], and the inverse key norms as rows.

        Entry (i, j) is the decay from token j to token i times the inverse norm of key j.
        """
        decay, k_norm = load(vectors[2].at[head, chunk]), inverse_norm(k_s)
        store(vectors_s.at[group], k_norm)
        decay_col, norm_col = (along_columns(load(x, COL), L) for x in (vectors[2].at[head, chunk], vectors_s.at[group]))
        return jnp.exp(jnp.minimum(along_rows(decay, L) - decay_col, 0.0)) * norm_col, k_norm

    @pl.when((num_tokens[chunk] > 0) & (group == 0))
    def _values_and_queries():
        fetch()
        q_scale, k_scale, _, beta = (load(x.at[head, chunk]) for x in vectors)
        plgpu.barrier_wait(ready[0])
        right = product(inverse_s.transpose(TRANSPOSE), d_s.transpose(TRANSPOSE))
        plgpu.barrier_arrive(solved_by_both)
        grads.d_beta[head, chunk, 0] = _row_dot(right, v_s)
        store_part(right * along_rows(beta, K), 2, v_s)

        plgpu.barrier_wait(ready[1])
        between, _ = decay_matrix()
        i, j, q_norm = iota((L, L), 0), iota((L, L), 1), inverse_norm(q_s)
        seen = product(o_s, n_s)
        store(pairs_s, jnp.where(i > j, seen * att_s[...].astype(jnp.float32), 0.0))
        store_shared(jnp.where(i >= j, seen * between * along_rows(q_norm * K**-0.5, L), 0.0), att_s)
        plgpu.barrier_arrive(attended)

        plgpu.barrier_wait(ready[2])
        written = product(n_s.transpose(TRANSPOSE), after_s) * along_rows(k_scale, K)
        into = _row_dot(written, k_s)
        plgpu.barrier_wait(solved_by_both)
        store_shared(written, keys_s)
        plgpu.barrier_arrive(written_down)
        d_q = product(o_s, before_s) * along_rows(q_scale, K)
        grads.d_decay[head, chunk, 0] = _row_dot(d_q, q_s) - into
        store_part(_norm_backward(accumulate(d_q, att_s, k_s), q_s, q_norm), 0, v_s)
        halves = (pl.ds(0, L), pl.ds(L, L))
        saved = sum(_row_dot(before_s.at[h][...].astype(jnp.float32), after_s.at[h]) for h in halves)
        grads.d_last_decay[head, chunk] = into + saved * jnp.exp(vectors[2][head, chunk, L - 1])
        plgpu.wait_smem_to_gmem(0)

    @pl.when((num_tokens[chunk] > 0) & (group == 1))
    def _keys():
        decay, beta = (load(x.at[head, chunk]) for x in vectors[2:])
        plgpu.barrier_wait(ready[0])
        solved = product(inverse_s.transpose(TRANSPOSE), d_s.transpose(TRANSPOSE)).astype(k_s.dtype)
        plgpu.barrier_arrive(solved_by_both)

        plgpu.barrier_wait(ready[1])
        between, k_norm = decay_matrix()
        i, j = iota((L, L), 0), iota((L, L), 1)
        d_overlap = jnp.where(i > j, -product(solved, n_s), 0.0) * between * along_rows(k_norm, L)
        plgpu.barrier_wait(solved_by_both)
        store_shared(d_overlap * along_rows(beta, L), inverse_s)
        d_overlap = d_overlap * product(k_s, k_s.transpose(TRANSPOSE))
        strength = jnp.sum(d_overlap, axis=1)
        plgpu.barrier_wait(attended)
        pairs = d_overlap * along_rows(beta, L) + load(pairs_s, MATRIX)
        store(vectors_s.at[2], jnp.sum(pairs, axis=0))
        slope = jnp.sum(pairs, axis=1) - load(vectors_s.at[2])

        plgpu.barrier_wait(ready[2])
        d_k = product(solved, before_s)
        read = _row_dot(d_k, k_s) * k_norm * jnp.exp(decay)
        grads.d_beta[head, chunk, 1] = strength - read
        grads.d_decay[head, chunk, 1] = slope - beta * read
        d_k = d_k * along_rows(-beta * jnp.exp(decay) * k_norm, K)
        for x, y in ((inverse_s, k_s), (inverse_s.transpose(TRANSPOSE), k_s), (att_s.transpose(TRANSPOSE), q_s)):
            d_k = accumulate(d_k, x, y)
        plgpu.barrier_wait(written_down)
        d_k = d_k + keys_s[...].astype(jnp.float32)
        store_part(_norm_backward(d_k, k_s, k_norm), 1, keys_s)
        plgpu.wait_smem_to_gmem(0)


def _row_dot(x, ref):
    """Returns the dot product of each row. Reading `ref` again costs less than keeping it in registers."""
    return jnp.sum(x * ref[...].astype(jnp.float32), axis=1)


def _norm_backward(d_x, ref, inverse_norm):
    """Returns the cotangent of `x` from that of `x / |x|`, which is divided by `|x|` already."""
    length = _row_dot(d_x, ref) * inverse_norm * inverse_norm
    return d_x - ref[...].astype(jnp.float32) * along_rows(length, d_x.shape[1])


ROWS_BEFORE = 8  # rows before a chunk's first in shared memory; the convolution reads three
ROWS_AFTER = 8  # rows after its last; the convolution of three of them reads the chunk
STEP = 16  # rows held in registers at a time
# A thread holds 4 neighbouring channels of a row, and a warp holds a whole row.
BY_ROWS = plgpu.Layout.TILED(plgpu.Tiling(((4, LANES), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def convolution_gradients(
    qkv: Float[Array, "T C"],
    conv: Float[Array, "C W"],
    conv_state: Float[Array, "S history C"],
    grads: Float[Array, "chunks L C"],
    table: Chunks,
    query_starts: Int32[Array, " S"],
    query_lens: Int32[Array, " S"],
) -> tuple[Float[Array, "T C"], Float[Array, "C W"], Float[Array, "S history C"]]:
    """Propagates cotangents through SiLU and the convolution, which it computes again.

    Args:
      grads: cotangents of the convolution's outputs, chunk by chunk.

    Returns:
      Cotangents of `qkv`, `conv` and `conv_state`.
    """
    (T, C), (S, _, _), (chunks, W) = qkv.shape, conv_state.shape, (grads.shape[0], conv.shape[1])
    sequence_ids = jnp.minimum(table.sequence, S - 1)
    # Rows of each chunk and its next three that have a cotangent.
    num_rows = jnp.where(table.num_tokens > 0, jnp.minimum(query_lens[sequence_ids] - L * table.index, L + CONV_HISTORY), 0)
    kernel = plgpu.kernel(
        functools.partial(_convolution_gradients, W=W),
        out_type=(
            jax.ShapeDtypeStruct((T, C), qkv.dtype),
            jax.ShapeDtypeStruct((S, L, C), qkv.dtype),
            jax.ShapeDtypeStruct((chunks, W, C), jnp.float32),
            jax.ShapeDtypeStruct((S, ROWS_BEFORE, C), conv_state.dtype),
        ),
        grid=(chunks, C // LANES),
        grid_names=("chunk", "part"),
        scratch_types=[
            plgpu.SMEM((ROWS_BEFORE + L + ROWS_AFTER, LANES), qkv.dtype),  # inputs
            plgpu.SMEM((L + ROWS_AFTER, LANES), qkv.dtype),  # cotangents after SiLU, then before it
            plgpu.SMEM((ROWS_BEFORE + L + ROWS_AFTER, LANES), jnp.float32),
            plgpu.Barrier(num_arrivals=4),
        ],
        compiler_params=params(approximate=True, reduction_scratch_bytes=4096),
        kernel_name="gated_delta_convolution_gradients",
    )
    d_qkv, partial, taps, d_history = kernel(qkv, conv.T, conv_state, grads, sequence_ids, table.start, table.index, num_rows)
    row = jnp.arange(T, dtype=jnp.int32)
    owned = jnp.any((row[None] >= query_starts[:, None]) & (row[None] < (query_starts + query_lens)[:, None]), axis=0)
    d_qkv = scatter_partial_chunks(d_qkv, partial, query_starts, query_lens).at[jnp.where(owned, T, row)].set(0, mode="drop")
    d_conv_state = jnp.where(
        (query_lens > 0)[:, None, None], d_history[:, ROWS_BEFORE - CONV_HISTORY :], jnp.zeros((), conv_state.dtype)
    )
    return d_qkv, taps.sum(axis=0).T.astype(conv.dtype), d_conv_state


def _convolution_gradients(*refs, W):
    (
        qkv,
        conv,
        conv_state,
        grads,
        sequence,
        start,
        index,
        num_rows,
        out,
        partial,
        d_taps,
        d_history,
        raw_s,
        d_out_s,
        linear_s,
        ready,
    ) = refs
    chunk, part = lax.axis_index("chunk"), lax.axis_index("part")
    channels, real = pl.ds(part * LANES, LANES), num_rows[chunk]

    @pl.when(real == 0)
    def _():
        for i in range(W):
            d_taps[chunk, i, channels] = jnp.zeros(LANES, jnp.float32)

    @pl.when(real > 0)
    def _():
        before, dst = raw_s.at[pl.ds(ROWS_BEFORE - CONV_HISTORY, CONV_HISTORY)], raw_s.at[pl.ds(ROWS_BEFORE, L + ROWS_AFTER)]
        fetch_rows(qkv, conv_state, channels, before, dst, ready, start[chunk], index[chunk], sequence[chunk])
        plgpu.copy_gmem_to_smem(grads.at[chunk, :, channels], d_out_s.at[pl.ds(0, L)], ready)
        following = jnp.minimum(chunk + 1, grads.shape[0] - 1)
        plgpu.copy_gmem_to_smem(grads.at[following, pl.ds(0, ROWS_AFTER), channels], d_out_s.at[pl.ds(L, ROWS_AFTER)], ready)
        taps = [load(conv.at[i, channels], BY_ROWS.reduce(0)).astype(jnp.float32) for i in range(W)]

        def spread(tap, count):
            return plgpu.layout_cast(along_columns(tap, count), BY_ROWS)

        def zeros(count):
            return plgpu.layout_cast(jnp.zeros((count, LANES), jnp.float32), BY_ROWS)

        linear_s[pl.ds(0, ROWS_BEFORE)] = zeros(ROWS_BEFORE)
        plgpu.barrier_wait(ready)
        tap_sums = [zeros(STEP)] * W  # for the cotangent of each tap
        for first_chunk, count in (*((i, STEP) for i in range(0, L, STEP)), (L, ROWS_AFTER)):
            x = [
                load(raw_s.at[pl.ds(ROWS_BEFORE - CONV_HISTORY + first_chunk + i, count)], BY_ROWS).astype(jnp.float32)
                for i in range(W)
            ]
            linear = sum(value * spread(tap, count) for value, tap in zip(x, taps, strict=True))
            share = sigmoid(linear)
            d_x = load(d_out_s.at[pl.ds(first_chunk, count)], BY_ROWS).astype(jnp.float32) * share * (1 + linear * (1 - share))
            rows = plgpu.broadcasted_iota(jnp.int32, (count, LANES), 0, layout=BY_ROWS) + first_chunk
            store(linear_s.at[pl.ds(ROWS_BEFORE + first_chunk, count)], jnp.where(rows < real, d_x, 0.0))
            if first_chunk < L:
                tap_sums = [total + jnp.where(rows < real, d_x * value, 0.0) for total, value in zip(tap_sums, x, strict=True)]
        for i, total in enumerate(tap_sums):
            store(d_taps.at[chunk, i, channels], jnp.sum(total, axis=0))

        def input_gradient(first_chunk, count):
            behind = (load(linear_s.at[pl.ds(ROWS_BEFORE + first_chunk + back, count)], BY_ROWS) for back in range(W))
            return sum(d_x * spread(taps[W - 1 - back], count) for back, d_x in enumerate(behind))

        @pl.when(real >= L)
        def _():
            for first_chunk in range(0, L, STEP):
                store(
                    out.at[pl.ds(start[chunk] + first_chunk, STEP), channels], input_gradient(first_chunk, STEP).astype(out.dtype)
                )

        @pl.when(real < L)
        def _():
            for first_chunk in range(0, L, STEP):
                store(
                    partial.at[sequence[chunk], pl.ds(first_chunk, STEP), channels],
                    input_gradient(first_chunk, STEP).astype(out.dtype),
                )

        @pl.when(index[chunk] == 0)
        def _():
            store(d_history.at[sequence[chunk], :, channels], input_gradient(-ROWS_BEFORE, ROWS_BEFORE).astype(d_history.dtype))
