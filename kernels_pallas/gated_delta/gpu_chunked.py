"""`chunked` for Hopper, in two kernels with little around them:

1. `systems`: every chunk of every head on its own. Convolution and SiLU; then the unit lower-triangular system that orders the
   chunk's writes is inverted by doubling blocks, D[2b] = D[b] - D[b] A[b] D[b], in bfloat16 products: five steps of two 64x64x64
   products each. Measured against an inverse in float32, that adds under a fifth to the error that bfloat16 operands cost anyway.
2. `scan`: chunk after chunk of a sequence. The memory stays in registers, float32, and is its own left operand: transposed,
   `[V, K]`, it needs no way through shared memory. One block works on one head; each of its warpgroups keeps 64 value channels.

Sequences start anywhere in the row of tokens, but copies of tiles must start at a multiple of 8 rows: so the first kernel lays
chunks out one after the other, padded with zeros, and XLA gathers the outputs back. q and k are never normalised in memory: their
lengths are factors of rows and columns of 64x64 matrices, or of vectors.
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

from kernels_pallas.gated_delta.packing import CHUNK, Chunks, chunk_table, snapshot_of_chunk
from kernels_pallas.gated_delta.reference import L2_EPS, chunk_gates
from kernels_pallas.gpu.mosaic import (
    ACROSS,
    COL,
    MATRIX,
    ROW,
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
from kernels_pallas.tuning import chosen

L = CHUNK
SLICE = 64  # value channels of a warpgroup: the rows of one wgmma
TAIL = 3  # inputs of the convolution before a token


def forward(
    qkv: Float[Array, "T C"],
    a: Float[Array, "T N"],
    b: Float[Array, "T N"],
    conv: Float[Array, "C W"],
    a_log: Float[Array, " N"],
    dt_bias: Float[Array, " N"],
    memory: Float32[Array, "S N V K"],
    tail: Float[Array, "S tail C"],
    starts: Int32[Array, " S"],
    lengths: Int32[Array, " S"],
    snapshots: Int32[Array, "P 2"],
    *,
    keep: bool,
) -> tuple[tuple[Float[Array, "T N V"], Float32[Array, "S N V K"], Float32[Array, "P N V K"]], tuple]:
    """`reference.chunked`; and what its kernels know, (System, Solution, Memories), the last two if `keep` asks for them."""
    T, (_, N, V, _) = qkv.shape[0], memory.shape
    table = chunk_table(starts, lengths, T)
    g, beta = (x.transpose(2, 0, 1) for x in chunk_gates(a, b, a_log, dt_bias, table))
    system, solution = systems(qkv, conv, tail, g, beta, table, keep=keep)
    taken = snapshot_of_chunk(table, snapshots)
    out, end, kept, memories = scan(system, memory, starts, lengths, taken, T, snapshots.shape[0], keep=keep)
    there = jnp.any(taken[None] == jnp.arange(snapshots.shape[0], dtype=jnp.int32)[:, None], axis=1)
    kept = jnp.where(there[:, None, None, None], kept, 0.0)
    return (out.reshape(T, N, V), end, kept), (system, solution, memories)


class System(NamedTuple):
    """What `systems` finds out about each chunk, for `scan`: writes are `u - w S^T`, outputs `q_scale q S^T + attention writes`.

    Attributes:
      q, k: queries and keys after the convolution, of any length.
      w, u: the solved system's right-hand sides; u transposed.
      attention: of each token to the chunk's earlier ones.
      q_scale, k_scale: what a query is worth when it reads the memory before the chunk, and a key's write at the chunk's end.
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


class Solution(NamedTuple):
    """What the backward pass wants to know besides: values after the convolution, and each system's inverse."""

    v: Float[Array, "chunks N L V"]
    inverse: Float[Array, "chunks N L L"]


class Memories(NamedTuple):
    """What it wants to know of the scan: the memory before each chunk, and each token's write, transposed."""

    before: Float[Array, "chunks N V K"]
    writes: Float[Array, "chunks N V L"]


def systems(
    qkv: Float[Array, "T C"],
    conv: Float[Array, "C W"],
    tail: Float[Array, "S tail C"],
    g: Float32[Array, "N chunks L"],
    beta: Float32[Array, "N chunks L"],
    table: Chunks,
    *,
    keep: bool = False,
) -> tuple[System, Solution | None]:
    """Convolves every chunk and solves its system; `keep` for a backward pass."""
    N, chunks, _ = g.shape
    K = V = qkv.shape[1] // (3 * N)
    vector = jax.ShapeDtypeStruct((N, chunks, L), jnp.float32)
    shapes = ((L, K), (L, K), (L, K), (V, L), (L, L), (L, V), (L, L))
    *matrices, values, inverse = (jax.ShapeDtypeStruct((chunks, N, *shape), qkv.dtype) for shape in shapes)
    kernel = plgpu.kernel(
        functools.partial(_systems, N=N, K=K),
        out_type=(System(*matrices, vector, vector, vector), Solution(values, inverse) if keep else None),
        grid=(chunks, N),
        grid_names=("chunk", "head"),
        scratch_types=[
            *(tiles(L, K), tiles(L, K), tiles(L, V)),  # q, k, v after the convolution
            plgpu.RefUnion(
                [plgpu.SMEM((3, TAIL + L + 5, K), qkv.dtype)],  # before it, in rows; 5 to the next multiple of 8
                [tiles(L, L), tiles(L, L), tiles(L, K), tiles(V, L)],  # the inverse, products on the way to it, w and u
            ),
            plgpu.SMEM((2, L), jnp.float32),  # vectors on their way from rows to columns
            plgpu.Barrier(num_arrivals=6),
        ],
        compiler_params=params(approximate=True),
        kernel_name="gated_delta_systems",
    )
    sequence = jnp.minimum(table.sequence, tail.shape[0] - 1)
    return kernel(qkv, conv.T, tail, g, beta, sequence, table.row, table.rows, table.index)


def _systems(*refs, N, K):
    qkv, conv, tail, g, beta, sequence, row, rows, index, *rest = refs
    system, solution, q_s, k_s, v_s, shared, vectors_s, ready = rest
    out_q, out_k, out_w, out_u, out_att, out_q_scale, out_k_scale, out_decay = system
    (raw_s,), (d_s, m_s, w_s, u_s) = shared
    chunk, head = lax.axis_index("chunk"), lax.axis_index("head")

    @pl.when(rows[chunk] > 0)
    def _():
        channels = [pl.ds((i * N + head) * K, K) for i in range(3)]
        for i, run in enumerate(channels):
            before, place = raw_s.at[i, pl.ds(0, TAIL)], raw_s.at[i, pl.ds(TAIL, L)]
            fetch_rows(qkv, tail, run, before, place, ready, row[chunk], index[chunk], sequence[chunk])
        beta_row, beta_col = (load(beta.at[head, chunk], layout) for layout in (ROW, COL))
        i, j = iota((L, L), 0), iota((L, L), 1)
        g_col = along_columns(load(g.at[head, chunk], COL), L)
        decay_row = jnp.sum(jnp.where(i >= j, g_col, 0.0), axis=1)  # a cumulative sum
        rest_row = jnp.sum(jnp.where(i < j, g_col, 0.0), axis=1)  # from each token to the chunk's end
        plgpu.barrier_wait(ready)
        for n, (run, place) in enumerate(zip(channels, (q_s, k_s, v_s), strict=True)):
            place[...] = _convolve(raw_s.at[n], conv, run, rows[chunk]).astype(place.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, out_q.at[chunk, head])
        plgpu.copy_smem_to_gmem(k_s, out_k.at[chunk, head])
        if solution:
            plgpu.copy_smem_to_gmem(v_s, solution.v.at[chunk, head])
        k_norm, q_norm = inverse_length(k_s), inverse_length(q_s) * K**-0.5
        out_q_scale[head, chunk] = q_norm * jnp.exp(decay_row)
        out_k_scale[head, chunk] = k_norm * jnp.exp(rest_row)
        out_decay[head, chunk] = decay_row
        vectors_s[0], vectors_s[1] = k_norm, decay_row
        k_norm_col, decay_col = (load(vectors_s.at[n], COL) for n in range(2))

        between = jnp.exp(jnp.minimum(along_rows(decay_row, L) - along_columns(decay_col, L), 0.0)) * along_columns(k_norm_col, L)
        attention = jnp.where(i >= j, product(q_s, k_s.transpose(ACROSS)) * between * along_rows(q_norm, L), 0.0)
        send(attention, m_s, out_att.at[chunk, head])
        overlap = product(k_s, k_s.transpose(ACROSS)) * between * along_rows(k_norm * beta_row, L)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        inverse = invert(jnp.where(i > j, overlap, 0.0), i, j, d_s, m_s)

        if solution:
            send(inverse, m_s, solution.inverse.at[chunk, head])

        solved = inverse * along_columns(beta_col, L)
        put(solved, d_s)
        reads = (solved * along_columns(jnp.exp(decay_col) * k_norm_col, L)).astype(w_s.dtype)
        send(product(reads, k_s), w_s, out_w.at[chunk, head])
        send(product(v_s.transpose(ACROSS), d_s.transpose(ACROSS)), u_s, out_u.at[chunk, head])
        plgpu.wait_smem_to_gmem(0)


def fetch_rows(qkv, tail, run, before, place, ready, row, index, sequence):
    """A chunk's inputs and the three before them; in front of a sequence's first chunk stands its tail. Two arrivals."""
    plgpu.copy_gmem_to_smem(qkv.at[pl.ds(row, place.shape[0]), run], place, ready)

    @pl.when(index == 0)
    def _():
        plgpu.copy_gmem_to_smem(tail.at[sequence, :, run], before, ready)

    @pl.when(index > 0)
    def _():
        plgpu.copy_gmem_to_smem(qkv.at[pl.ds(row - TAIL, TAIL), run], before, ready)


def _convolve(raw, conv, run, real):
    """Convolution and SiLU of a chunk's run of channels; zeros in rows that are not its own, whatever they hold."""
    shape = (L, raw.shape[1])
    layout = by_rows(raw.at[pl.ds(0, L)])
    total = 0.0
    for i in range(TAIL + 1):
        tap = load(conv.at[i, run], layout.reduce(0)).astype(jnp.float32)
        total += load(raw.at[pl.ds(i, L)], layout).astype(jnp.float32) * plgpu.layout_cast(along_columns(tap, L), layout)
    rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    return jnp.where(rows < real, silu(total), 0.0)


def by_rows(ref):
    """The layout in which a thread holds 16 neighbouring bytes of a row: whole sectors of memory, and no bank twice."""
    return plgpu.Layout.SMEM_GMEM_COPY(ref.shape, ref.dtype, 128)


def invert(A, i, j, d_s, m_s):
    """`(I + A)^-1` of a strictly lower-triangular [L, L], by doubling its diagonal blocks from 2 to L."""
    apart = i ^ j  # from block to 2 * block - 1 in the corners that a step fills
    D = jnp.where(apart == 0, 1.0, jnp.where(apart == 1, -A, 0.0))
    block = 2
    while block < L:
        corner = jnp.where((apart >= block) & (apart < 2 * block), A, 0.0).astype(d_s.dtype)
        half = D.astype(d_s.dtype)
        put(half, d_s)
        put(product(corner, d_s), m_s)
        D = D - product(half, m_s)
        block *= 2
    return D


def put(x, place):
    """Registers to shared memory, for products and copies to read."""
    place[...] = x.astype(place.dtype)
    plgpu.commit_smem()


def send(x, place, destination):
    """Registers to device memory by way of shared memory; wait before `place` is written again."""
    put(x, place)
    plgpu.copy_smem_to_gmem(place, destination)


def inverse_length(ref):
    """`1 / sqrt(sum x^2 + eps)` of each row."""
    x = ref[...].astype(jnp.float32)
    return lax.rsqrt(jnp.sum(x * x, axis=1) + L2_EPS)


def scan(
    system: System,
    memory: Float32[Array, "S N V K"],
    starts: Int32[Array, " S"],
    lengths: Int32[Array, " S"],
    taken: Int32[Array, " chunks"],
    tokens: int,
    snapshots: int,
    *,
    keep: bool = False,
) -> tuple[Float[Array, "T NV"], Float32[Array, "S N V K"], Float32[Array, "P N V K"], Memories | None]:
    """Hands the memory from chunk to chunk, and reads.

    Whole chunks of outputs go to their tokens at once; a sequence's last tokens, short of a chunk, are put there by XLA.

    The warpgroups of a block share what they load; with few heads in all, each gets a block of its own. `keep` for a backward
    pass.
    """
    S, N, V, K = memory.shape
    slices, dtype = V // SLICE, system.q.dtype
    cut = chosen("gpu", "gated_delta_scan", S * N)
    groups, stages = cut.groups, cut.stages
    shape, chunks = jax.ShapeDtypeStruct, taken.shape[0]
    kernel = plgpu.kernel(
        functools.partial(_scan, V=V, stages=stages, groups=groups),
        out_type=[
            shape((tokens, N * V), dtype),
            shape((S, L, N * V), dtype),
            shape(memory.shape, jnp.float32),
            shape((max(snapshots, 1), N, V, K), jnp.float32),
            Memories(shape((chunks, N, V, K), dtype), shape((chunks, N, V, L), dtype)) if keep else None,
        ],
        grid=(S, N, slices // groups),
        grid_names=("sequence", "head", "block"),
        num_threads=groups + 1,  # the last only fetches
        thread_name="group",
        scratch_types=[
            *(tiles(stages, L, K), tiles(stages, L, K), tiles(stages, L, K)),  # q, k, w
            *(tiles(stages, groups * SLICE, L), tiles(stages, L, L)),  # u, attention
            *(plgpu.SMEM((stages, L), jnp.float32), plgpu.SMEM((stages, L), jnp.float32)),  # q_scale, k_scale
            tiles(groups, L, SLICE),  # outputs, to be turned
            Memories(tiles(groups, SLICE, K), tiles(groups, SLICE, L)) if keep else None,  # on their way
            plgpu.Barrier(num_arrivals=FETCHED, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        ],
        compiler_params=params(approximate=True),
        kernel_name="gated_delta_scan",
    )
    counts = (lengths + L - 1) // L
    first = jnp.cumsum(counts) - counts
    out, last, end, kept, memories = kernel(*system, memory, first, counts, starts, lengths, taken)
    return with_last(out, last, starts, lengths), end, kept[:snapshots], memories


def with_last(
    rows: Float[Array, "T D"], last: Float[Array, "S L D"], starts: Int32[Array, " S"], lengths: Int32[Array, " S"]
) -> Float[Array, "T D"]:
    """Puts the tokens of each sequence's last chunk in place, where that is not a whole one."""
    within = jnp.arange(L, dtype=jnp.int32)[None]
    places = jnp.where(within < (lengths % L)[:, None], (starts + lengths // L * L)[:, None] + within, rows.shape[0])
    return rows.at[places].set(last, mode="drop")


FETCHED = 7  # of a System: all but the decay, of which a chunk needs one number


def _scan(*refs, V, stages, groups):
    inputs, (decay, memory, first, counts, starts, lengths, taken), rest = refs[:7], refs[7:14], refs[14:]
    out, last, end, kept, memories, *buffers, out_s, kept_s, ready, consumed = rest
    q_s, k_s, w_s, u_s, att_s, q_scale_s, k_scale_s = buffers
    sequence, head, block, group = (lax.axis_index(name) for name in ("sequence", "head", "block", "group"))
    count, start = counts[sequence], first[sequence]

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
            for source, place in zip((*matrices, q_scale.at[head, chunk], k_scale.at[head, chunk]), buffers, strict=True):
                plgpu.copy_gmem_to_smem(source, place.at[slot], ready.at[slot])

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(208, action="increase")
        channel = (block * groups + group) * SLICE
        mine, lanes = pl.ds(channel, SLICE), pl.ds(head * V + channel, SLICE)
        origin, length = starts[sequence], lengths[sequence]

        def hand_over(i, state):
            slot, chunk = lax.rem(i, stages), start + i
            fade, snapshot = jnp.exp(decay[head, chunk, L - 1]), taken[chunk]
            plgpu.barrier_wait(ready.at[slot])
            before = state.astype(out.dtype)
            writes = u_s.at[slot, pl.ds(group * SLICE, SLICE)][...].astype(jnp.float32)
            writes = writes - product(before, w_s.at[slot].transpose(ACROSS))
            read = product(before, q_s.at[slot].transpose(ACROSS)) * along_columns(load(q_scale_s.at[slot], COL), SLICE)
            added = writes.astype(out.dtype)
            if memories:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for x, place, destination in zip((before, added), kept_s, memories, strict=True):
                    send(x, place.at[group], destination.at[chunk, head, mine])
            read = accumulate(read, added, att_s.at[slot].transpose(ACROSS))
            scaled = (writes * along_columns(load(k_scale_s.at[slot], COL), SLICE)).astype(out.dtype)
            state = accumulate(state * fade, scaled, k_s.at[slot])
            plgpu.barrier_arrive(consumed.at[slot])

            turned = out_s.at[group]
            turned.transpose(ACROSS)[...] = plgpu.layout_cast(read.astype(out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            whole = L * (i + 1) <= length

            @pl.when(whole)
            def _():
                out[pl.ds(origin + L * i, L), lanes] = load(turned, by_rows(turned))

            @pl.when(~whole)
            def _():
                last[sequence, :, lanes] = load(turned, by_rows(turned))

            @pl.when(snapshot >= 0)
            def _snapshot():
                kept[snapshot, head, mine] = state

            return state

        state = load(memory.at[sequence, head, mine], MATRIX)
        end[sequence, head, mine] = lax.fori_loop(0, count, hand_over, state)
        if memories:
            plgpu.wait_smem_to_gmem(0)
