"""Forward pass of `chunked` for Hopper, as two kernels with little XLA around them.

1. `prepare_chunks` handles every chunk of every head on its own. It applies convolution and SiLU. It then
   inverts the unit lower-triangular system that orders the chunk's writes. The inverse is built by doubling
   blocks, D[2b] = D[b] - D[b] A[b] D[b], in bfloat16 products: five steps of two 64x64x64 products each.
   That adds under a fifth to the error of bfloat16 operands, compared with a float32 inverse.
2. `scan` walks the chunks of a sequence in order. The recurrent state stays in registers, in float32, and
   is the left operand of its products. Its transposed layout `[V, K]` avoids a trip through shared memory.
   One block handles one head. Each of its warpgroups holds 64 value channels.

A sequence may start at any token, but tile copies must start at a multiple of 8 rows. The first kernel
therefore writes the chunks one after the other, padded with zeros. XLA scatters the tokens of partial chunks
into the output. Normalised q and k are never stored: their inverse norms scale rows and columns of 64x64
matrices, or vectors.
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
from kernels_pallas.gated_delta.packing import CHUNK, Chunks, chunk_table, snapshot_of_chunk
from kernels_pallas.gated_delta.reference import L2_EPS, chunk_gates
from kernels_pallas.gpu.mosaic import (
    COL,
    MATRIX,
    ROW,
    TRANSPOSE,
    accumulate,
    along_columns,
    along_rows,
    iota,
    load,
    params,
    product,
    silu,
    tiles,
)
from kernels_pallas.tuning import tuned_config

L = CHUNK
SLICE = 64  # value channels of a warpgroup: the rows of one wgmma
CONV_HISTORY = 3  # earlier inputs that the convolution reads for a token


def forward(
    arguments: ChunkedArguments, *, save_residuals: bool
) -> tuple[tuple[Float[Array, "T N V"], Float32[Array, "S N V K"], Float32[Array, "P N V K"]], tuple]:
    """Runs `reference.chunked` on Hopper.

    Returns:
      The results of `reference.chunked`, and (ChunkTerms, PrepareResiduals, ScanResiduals) for the backward
      pass. The last two are None unless `save_residuals` is set.
    """
    qkv, a, b, conv, a_log, dt_bias, recurrent_state, conv_state, query_starts, query_lens, snapshots = arguments
    T, (_, N, V, _) = qkv.shape[0], recurrent_state.shape
    table = chunk_table(query_starts, query_lens, T)
    g, beta = (x.transpose(2, 0, 1) for x in chunk_gates(a, b, a_log, dt_bias, table))
    terms, residuals = prepare_chunks(qkv, conv, conv_state, g, beta, table, save_residuals=save_residuals)
    chunk_snapshots = snapshot_of_chunk(table, snapshots)
    out, final_states, snapshot_states, scan_residuals = scan(
        terms, recurrent_state, query_starts, query_lens, chunk_snapshots, T, snapshots.shape[0], save_residuals=save_residuals
    )
    is_taken = jnp.any(chunk_snapshots[None] == jnp.arange(snapshots.shape[0], dtype=jnp.int32)[:, None], axis=1)
    snapshot_states = jnp.where(is_taken[:, None, None, None], snapshot_states, 0.0)
    return (out.reshape(T, N, V), final_states, snapshot_states), (terms, residuals, scan_residuals)


class ChunkTerms(NamedTuple):
    """Terms of each chunk that `prepare_chunks` computes for `scan`.

    With S the state before the chunk, the chunk's writes are `u - w S^T`, and its outputs are
    `q_scale q S^T + attention writes`.

    Attributes:
      q, k: queries and keys after the convolution, not normalised.
      w, u: solutions of the chunk's system; u is transposed.
      attention: scores of each token with the earlier tokens of its chunk.
      q_scale: factor of each query when it reads the state before the chunk.
      k_scale: factor of each key's write at the chunk's end.
      decay: log of the decay from the chunk's start to each token.
    """

    q: Float[Array, "chunks N L K"]
    k: Float[Array, "chunks N L K"]
    w: Float[Array, "chunks N L K"]
    u: Float[Array, "chunks N V L"]
    attention: Float[Array, "chunks N L L"]
    q_scale: Float32[Array, "N chunks L"]
    k_scale: Float32[Array, "N chunks L"]
    decay: Float32[Array, "N chunks L"]


class PrepareResiduals(NamedTuple):
    """Values after the convolution and each chunk's inverse, saved for the backward pass."""

    v: Float[Array, "chunks N L V"]
    inverse: Float[Array, "chunks N L L"]


class ScanResiduals(NamedTuple):
    """State before each chunk, and each token's write (transposed), saved for the backward pass."""

    states: Float[Array, "chunks N V K"]
    writes: Float[Array, "chunks N V L"]


def prepare_chunks(
    qkv: Float[Array, "T C"],
    conv: Float[Array, "C W"],
    conv_state: Float[Array, "S history C"],
    g: Float32[Array, "N chunks L"],
    beta: Float32[Array, "N chunks L"],
    table: Chunks,
    *,
    save_residuals: bool = False,
) -> tuple[ChunkTerms, PrepareResiduals | None]:
    """Convolves every chunk and solves its system. Returns residuals if `save_residuals` is set."""
    N, chunks, _ = g.shape
    K = V = qkv.shape[1] // (3 * N)
    vector = jax.ShapeDtypeStruct((N, chunks, L), jnp.float32)
    shapes = ((L, K), (L, K), (L, K), (V, L), (L, L), (L, V), (L, L))
    *matrices, values, inverse = (jax.ShapeDtypeStruct((chunks, N, *shape), qkv.dtype) for shape in shapes)
    kernel = plgpu.kernel(
        functools.partial(_prepare_chunks, N=N, K=K),
        out_type=(ChunkTerms(*matrices, vector, vector, vector), PrepareResiduals(values, inverse) if save_residuals else None),
        grid=(chunks, N),
        grid_names=("chunk", "head"),
        scratch_types=[
            *(tiles(L, K), tiles(L, K), tiles(L, V)),  # q, k, v after the convolution
            plgpu.RefUnion(
                [plgpu.SMEM((3, CONV_HISTORY + L + 5, K), qkv.dtype)],  # q, k, v before it, in rows; 5 pads to a multiple of 8
                [tiles(L, L), tiles(L, L), tiles(L, K), tiles(V, L)],  # inverse, intermediate products, w, u
            ),
            plgpu.SMEM((2, L), jnp.float32),  # vectors, to change from ROW to COL layout
            plgpu.Barrier(num_arrivals=6),
        ],
        compiler_params=params(approximate=True),
        kernel_name="gated_delta_prepare_chunks",
    )
    sequence = jnp.minimum(table.sequence, conv_state.shape[0] - 1)
    return kernel(qkv, conv.T, conv_state, g, beta, sequence, table.start, table.num_tokens, table.index)


def _prepare_chunks(*refs, N, K):
    qkv, conv, conv_state, g, beta, sequence, start, num_tokens, index, *rest = refs
    terms, residuals, q_s, k_s, v_s, shared, vectors_s, ready = rest
    out_q, out_k, out_w, out_u, out_att, out_q_scale, out_k_scale, out_decay = terms
    (raw_s,), (d_s, m_s, w_s, u_s) = shared
    chunk, head = lax.axis_index("chunk"), lax.axis_index("head")

    @pl.when(num_tokens[chunk] > 0)
    def _():
        channel_slices = [pl.ds((i * N + head) * K, K) for i in range(3)]
        for i, channels in enumerate(channel_slices):
            before, dst = raw_s.at[i, pl.ds(0, CONV_HISTORY)], raw_s.at[i, pl.ds(CONV_HISTORY, L)]
            fetch_rows(qkv, conv_state, channels, before, dst, ready, start[chunk], index[chunk], sequence[chunk])
        beta_row, beta_col = (load(beta.at[head, chunk], layout) for layout in (ROW, COL))
        i, j = iota((L, L), 0), iota((L, L), 1)
        g_col = along_columns(load(g.at[head, chunk], COL), L)
        decay_row = jnp.sum(jnp.where(i >= j, g_col, 0.0), axis=1)  # a cumulative sum
        rest_row = jnp.sum(jnp.where(i < j, g_col, 0.0), axis=1)  # from each token to the chunk's end
        plgpu.barrier_wait(ready)
        for n, (channels, dst) in enumerate(zip(channel_slices, (q_s, k_s, v_s), strict=True)):
            dst[...] = _convolve(raw_s.at[n], conv, channels, num_tokens[chunk]).astype(dst.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, out_q.at[chunk, head])
        plgpu.copy_smem_to_gmem(k_s, out_k.at[chunk, head])
        if residuals:
            plgpu.copy_smem_to_gmem(v_s, residuals.v.at[chunk, head])
        k_norm, q_norm = inverse_norm(k_s), inverse_norm(q_s) * K**-0.5
        out_q_scale[head, chunk] = q_norm * jnp.exp(decay_row)
        out_k_scale[head, chunk] = k_norm * jnp.exp(rest_row)
        out_decay[head, chunk] = decay_row
        vectors_s[0], vectors_s[1] = k_norm, decay_row
        k_norm_col, decay_col = (load(vectors_s.at[n], COL) for n in range(2))

        between = jnp.exp(jnp.minimum(along_rows(decay_row, L) - along_columns(decay_col, L), 0.0)) * along_columns(k_norm_col, L)
        attention = jnp.where(i >= j, product(q_s, k_s.transpose(TRANSPOSE)) * between * along_rows(q_norm, L), 0.0)
        store_global(attention, m_s, out_att.at[chunk, head])
        overlap = product(k_s, k_s.transpose(TRANSPOSE)) * between * along_rows(k_norm * beta_row, L)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        inverse = invert(jnp.where(i > j, overlap, 0.0), i, j, d_s, m_s)

        if residuals:
            store_global(inverse, m_s, residuals.inverse.at[chunk, head])

        solved = inverse * along_columns(beta_col, L)
        store_shared(solved, d_s)
        reads = (solved * along_columns(jnp.exp(decay_col) * k_norm_col, L)).astype(w_s.dtype)
        store_global(product(reads, k_s), w_s, out_w.at[chunk, head])
        store_global(product(v_s.transpose(TRANSPOSE), d_s.transpose(TRANSPOSE)), u_s, out_u.at[chunk, head])
        plgpu.wait_smem_to_gmem(0)


def fetch_rows(qkv, conv_state, channels, before, dst, ready, start, index, sequence):
    """Fetches a chunk's inputs and the three inputs before them; arrives twice at `ready`.

    The three inputs before a sequence's first chunk come from its conv state.
    """
    plgpu.copy_gmem_to_smem(qkv.at[pl.ds(start, dst.shape[0]), channels], dst, ready)

    @pl.when(index == 0)
    def _():
        plgpu.copy_gmem_to_smem(conv_state.at[sequence, :, channels], before, ready)

    @pl.when(index > 0)
    def _():
        plgpu.copy_gmem_to_smem(qkv.at[pl.ds(start - CONV_HISTORY, CONV_HISTORY), channels], before, ready)


def _convolve(raw, conv, channels, real):
    """Applies convolution and SiLU to one slice of a chunk's channels.

    Rows past the chunk's end become zeros, whatever they hold.
    """
    shape = (L, raw.shape[1])
    layout = row_layout(raw.at[pl.ds(0, L)])
    total = 0.0
    for i in range(CONV_HISTORY + 1):
        tap = load(conv.at[i, channels], layout.reduce(0)).astype(jnp.float32)
        total += load(raw.at[pl.ds(i, L)], layout).astype(jnp.float32) * plgpu.layout_cast(along_columns(tap, L), layout)
    rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    return jnp.where(rows < real, silu(total), 0.0)


def row_layout(ref):
    """Returns the layout in which a thread holds 16 neighbouring bytes of a row.

    Copies then cover whole memory sectors and have no bank conflicts.
    """
    return plgpu.Layout.SMEM_GMEM_COPY(ref.shape, ref.dtype, 128)


def invert(A, i, j, d_s, m_s):
    """Returns `(I + A)^-1` of a strictly lower-triangular [L, L], by doubling diagonal blocks from 2 to L."""
    xor = i ^ j  # block to 2 * block - 1 in the corners that a step fills
    D = jnp.where(xor == 0, 1.0, jnp.where(xor == 1, -A, 0.0))
    block = 2
    while block < L:
        corner = jnp.where((xor >= block) & (xor < 2 * block), A, 0.0).astype(d_s.dtype)
        half = D.astype(d_s.dtype)
        store_shared(half, d_s)
        store_shared(product(corner, d_s), m_s)
        D = D - product(half, m_s)
        block *= 2
    return D


def store_shared(x, dst):
    """Stores registers in shared memory, where products and copies can read them."""
    dst[...] = x.astype(dst.dtype)
    plgpu.commit_smem()


def store_global(x, buffer, dst):
    """Stores registers in device memory through shared memory. Wait before `buffer` is written again."""
    store_shared(x, buffer)
    plgpu.copy_smem_to_gmem(buffer, dst)


def inverse_norm(ref):
    """Returns `1 / sqrt(sum x^2 + eps)` of each row."""
    x = ref[...].astype(jnp.float32)
    return lax.rsqrt(jnp.sum(x * x, axis=1) + L2_EPS)


def scan(
    terms: ChunkTerms,
    recurrent_state: Float32[Array, "S N V K"],
    query_starts: Int32[Array, " S"],
    query_lens: Int32[Array, " S"],
    chunk_snapshots: Int32[Array, " chunks"],
    tokens: int,
    snapshots: int,
    *,
    save_residuals: bool = False,
) -> tuple[Float[Array, "T NV"], Float32[Array, "S N V K"], Float32[Array, "P N V K"], ScanResiduals | None]:
    """Scans the recurrent state over the chunks and computes the outputs.

    The kernel writes whole chunks of outputs to their tokens. XLA scatters the tokens of a sequence's last,
    partial chunk. The warpgroups of a block share their loads. With few heads in all, each warpgroup gets a
    block of its own, for more parallelism. `save_residuals` returns residuals for the backward pass.
    """
    S, N, V, K = recurrent_state.shape
    slices, dtype = V // SLICE, terms.q.dtype
    config = tuned_config("hopper", "gated_delta_scan", S * N)
    groups, stages = config.groups, config.stages
    shape, chunks = jax.ShapeDtypeStruct, chunk_snapshots.shape[0]
    kernel = plgpu.kernel(
        functools.partial(_scan, V=V, stages=stages, groups=groups),
        out_type=[
            shape((tokens, N * V), dtype),
            shape((S, L, N * V), dtype),
            shape(recurrent_state.shape, jnp.float32),
            shape((max(snapshots, 1), N, V, K), jnp.float32),
            ScanResiduals(shape((chunks, N, V, K), dtype), shape((chunks, N, V, L), dtype)) if save_residuals else None,
        ],
        grid=(S, N, slices // groups),
        grid_names=("sequence", "head", "block"),
        num_threads=groups + 1,  # the last one only issues copies
        thread_name="group",
        scratch_types=[
            *(tiles(stages, L, K), tiles(stages, L, K), tiles(stages, L, K)),  # q, k, w
            *(tiles(stages, groups * SLICE, L), tiles(stages, L, L)),  # u, attention
            *(plgpu.SMEM((stages, L), jnp.float32), plgpu.SMEM((stages, L), jnp.float32)),  # q_scale, k_scale
            tiles(groups, L, SLICE),  # outputs, to be transposed
            ScanResiduals(tiles(groups, SLICE, K), tiles(groups, SLICE, L)) if save_residuals else None,  # staging for residuals
            plgpu.Barrier(num_arrivals=NUM_FETCHED, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        ],
        compiler_params=params(approximate=True),
        kernel_name="gated_delta_scan",
    )
    num_chunks = (query_lens + L - 1) // L
    first_chunk = jnp.cumsum(num_chunks) - num_chunks
    out, partial, final_states, snapshot_states, scan_residuals = kernel(
        *terms, recurrent_state, first_chunk, num_chunks, query_starts, query_lens, chunk_snapshots
    )
    return (
        scatter_partial_chunks(out, partial, query_starts, query_lens),
        final_states,
        snapshot_states[:snapshots],
        scan_residuals,
    )


def scatter_partial_chunks(
    rows: Float[Array, "T D"], partial: Float[Array, "S L D"], query_starts: Int32[Array, " S"], query_lens: Int32[Array, " S"]
) -> Float[Array, "T D"]:
    """Scatters the tokens of each sequence's last chunk into `rows`, if that chunk is partial."""
    within = jnp.arange(L, dtype=jnp.int32)[None]
    places = jnp.where(within < (query_lens % L)[:, None], (query_starts + query_lens // L * L)[:, None] + within, rows.shape[0])
    return rows.at[places].set(partial, mode="drop")


NUM_FETCHED = 7  # fields of ChunkTerms copied per chunk: all but `decay`, which is read as one scalar


def _scan(*refs, V, stages, groups):
    inputs, (decay, recurrent_state, first_chunk, num_chunks, query_starts, query_lens, chunk_snapshots), rest = (
        refs[:7],
        refs[7:14],
        refs[14:],
    )
    out, partial, final_states, snapshot_states, scan_residuals, *buffers, out_s, residuals_s, ready, consumed = rest
    q_s, k_s, w_s, u_s, att_s, q_scale_s, k_scale_s = buffers
    sequence, head, block, group = (lax.axis_index(name) for name in ("sequence", "head", "block", "group"))
    count, start = num_chunks[sequence], first_chunk[sequence]

    @pl.when(group == groups)
    def _fetch():
        plgpu.set_max_registers(88, action="decrease")
        q, k, w, u, att, q_scale, k_scale = inputs

        @pl.loop(0, count)
        def _(i):
            slot, chunk = lax.rem(i, stages), start + i
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
            rows = u.at[chunk, head, pl.ds(block * groups * SLICE, groups * SLICE)]
            matrices = (*(x.at[chunk, head] for x in (q, k, w)), rows, att.at[chunk, head])
            for source, dst in zip((*matrices, q_scale.at[head, chunk], k_scale.at[head, chunk]), buffers, strict=True):
                plgpu.copy_gmem_to_smem(source, dst.at[slot], ready.at[slot])

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(208, action="increase")
        channel = (block * groups + group) * SLICE
        own_channels, lanes = pl.ds(channel, SLICE), pl.ds(head * V + channel, SLICE)
        origin, length = query_starts[sequence], query_lens[sequence]

        def scan_chunk(i, state):
            slot, chunk = lax.rem(i, stages), start + i
            fade, snapshot = jnp.exp(decay[head, chunk, L - 1]), chunk_snapshots[chunk]
            plgpu.barrier_wait(ready.at[slot])
            before = state.astype(out.dtype)
            writes = u_s.at[slot, pl.ds(group * SLICE, SLICE)][...].astype(jnp.float32)
            writes = writes - product(before, w_s.at[slot].transpose(TRANSPOSE))
            read = product(before, q_s.at[slot].transpose(TRANSPOSE)) * along_columns(load(q_scale_s.at[slot], COL), SLICE)
            new_values = writes.astype(out.dtype)
            if scan_residuals:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for x, buffer, dst in zip((before, new_values), residuals_s, scan_residuals, strict=True):
                    store_global(x, buffer.at[group], dst.at[chunk, head, own_channels])
            read = accumulate(read, new_values, att_s.at[slot].transpose(TRANSPOSE))
            scaled = (writes * along_columns(load(k_scale_s.at[slot], COL), SLICE)).astype(out.dtype)
            state = accumulate(state * fade, scaled, k_s.at[slot])
            plgpu.barrier_arrive(consumed.at[slot])

            transposed = out_s.at[group]
            transposed.transpose(TRANSPOSE)[...] = plgpu.layout_cast(read.astype(out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            is_full = L * (i + 1) <= length

            @pl.when(is_full)
            def _():
                out[pl.ds(origin + L * i, L), lanes] = load(transposed, row_layout(transposed))

            @pl.when(~is_full)
            def _():
                partial[sequence, :, lanes] = load(transposed, row_layout(transposed))

            @pl.when(snapshot >= 0)
            def _snapshot():
                snapshot_states[snapshot, head, own_channels] = state

            return state

        state = load(recurrent_state.at[sequence, head, own_channels], MATRIX)
        final_states[sequence, head, own_channels] = lax.fori_loop(0, count, scan_chunk, state)
        if scan_residuals:
            plgpu.wait_smem_to_gmem(0)
