"""`chunked` on TPU, forward: from the projections to what each token reads, one chunk of a few heads in each step of the grid.

A sequence starts at any row, but memory moves in tiles of up to 16 rows: a chunk comes and goes in a window of 80 rows that
starts on a tile. Tokens are shifted into place by a store and a load at different rows of a scratch buffer. What the window
holds of other sequences is read back before it is written, merged, and waited for before the next chunk reads: the grid walks
through the chunks in order. The memory stays in on-chip memory from a sequence's first chunk to its last.
Glossary: S sequences, T tokens, N heads, H heads of one step, K key width, V value width, L tokens of a chunk, C channels,
W conv width, P snapshots.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.gated_delta.packing import CHUNK, chunk_table, snapshot_of_chunk
from kernels_pallas.gated_delta.tpu_math import (
    LANES,
    compiler_params,
    convolved,
    dot,
    gates,
    lower_triangle,
    normalised,
    unit_inverse,
)

TILE = 16  # rows: bfloat16 is tiled by 16 rows on chip, float32 by 8
WINDOW = CHUNK + TILE  # holds a chunk wherever it starts
BEFORE = 8  # rows of scratch before the window, for what the convolution looks back at


class Places(NamedTuple):
    """Where each chunk lies; scalars, known before the kernel starts.

    Attributes:
      sequence: whose chunk it is; for padding the last real chunk's.
      window: the first row of its window.
      at: its first token in the window.
      rows: its tokens; 0 for padding.
      index: 0 for a sequence's first chunk.
      snapshot: which snapshot its end is, or -1.
    """

    sequence: Int32[Array, " chunks"]
    window: Int32[Array, " chunks"]
    at: Int32[Array, " chunks"]
    rows: Int32[Array, " chunks"]
    index: Int32[Array, " chunks"]
    snapshot: Int32[Array, " chunks"]


def places(starts: Int32[Array, " S"], lengths: Int32[Array, " S"], snapshots: Int32[Array, "P 2"], tokens: int) -> Places:
    """The chunk table as the kernels want it, for a row of `tokens` tokens, a multiple of TILE and at least WINDOW."""
    table = chunk_table(starts, lengths, tokens)
    last = jnp.max(jnp.where(table.rows > 0, table.sequence, 0))
    sequence = jnp.where(table.rows > 0, table.sequence, last)
    window = jnp.minimum(table.row // TILE * TILE, tokens - WINDOW)
    return Places(sequence, window, table.row - window, table.rows, table.index, snapshot_of_chunk(table, snapshots))


def forward(
    qkv: Float[Array, "T C"],
    gate_inputs: Float32[Array, "T lanes"],
    conv: Float32[Array, "W C"],
    rate: Float32[Array, "1 lanes"],
    bias: Float32[Array, "1 lanes"],
    memory: Float32[Array, "S N V K"],
    tail: Float[Array, "S tail C"],
    at: Places,
    snapshots: int,
    heads: int,
    states: bool = False,
) -> tuple[
    Float[Array, "T out"], Float32[Array, "S N V K"], Float32[Array, "P N V K"], *tuple[Float32[Array, "chunks N V K"], ...]
]:
    """The kernel over all chunks: what is read, the memory after each sequence, snapshots, and the memory before each chunk.

    Args:
      gate_inputs: `a` of all heads, then `b` of all heads, then nothing, in rows of 128.
      conv: the filters, oldest tap first.
      rate, bias: `exp(a_log)` and `dt_bias`, in rows of 128.
      at: the chunks.
      snapshots: how many.
      heads: of one step of the grid.
      states: whether to give the memory before each chunk, for the backward pass.
    """
    T, (_, N, V, K), dtype = qkv.shape[0], memory.shape, qkv.dtype
    chunks, groups, width = at.rows.shape[0], N // heads, heads * LANES

    def window(columns, column):
        block = pl.Element(WINDOW), pl.Element(columns)
        return pl.BlockSpec(block, lambda h, c, at: (pl.multiple_of(at.window[c], TILE), pl.multiple_of(column(h), LANES)))

    def channels(i):  # what there is of the step's queries, keys or values: rows, taps, tail
        return (
            window(width, lambda h: (h + i * groups) * width),
            pl.BlockSpec((conv.shape[0], width), lambda h, c, at: (0, h + i * groups)),
            pl.BlockSpec((1, tail.shape[1], width), lambda h, c, at: (at.sequence[c], 0, h + i * groups)),
        )

    rows, taps, tails = zip(*map(channels, range(3)), strict=True)
    constant = pl.BlockSpec((1, LANES), lambda h, c, at: (0, 0))
    state = pl.BlockSpec((1, heads, V, K), lambda h, c, at: (at.sequence[c], h, 0, 0))
    before = pl.BlockSpec((1, heads, V, K), lambda h, c, at: (c, h, 0, 0))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    shapes = [
        jax.ShapeDtypeStruct((T, N * V), dtype),
        jax.ShapeDtypeStruct(memory.shape, jnp.float32),
        jax.ShapeDtypeStruct((max(snapshots, 1), N, V, K), jnp.float32),  # a kernel takes no empty array
        *[jax.ShapeDtypeStruct((chunks, N, V, K), jnp.float32)] * states,
    ]
    zeros = [jnp.zeros(shapes[i].shape, shapes[i].dtype) for i in (0, 2)]
    constants, scalars = (rate, bias), len(at)
    out, ends, kept, *states = pl.pallas_call(
        functools.partial(_kernel, heads=heads, all_heads=N),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(groups, chunks),
            in_specs=[[hbm, hbm], state, list(rows), list(taps), list(tails), window(LANES, lambda h: 0), constant, constant],
            out_specs=[hbm, state, hbm, *[before] * states],
            scratch_shapes=[
                pltpu.VMEM((3 * heads, BEFORE + WINDOW + CHUNK, LANES), jnp.float32),
                pltpu.VMEM((3 * heads, conv.shape[0] - 1, LANES), jnp.float32),
                pltpu.VMEM((WINDOW + CHUNK, LANES), jnp.float32),
                pltpu.VMEM((heads, WINDOW + CHUNK, LANES), jnp.float32),
                pltpu.VMEM((WINDOW, width), dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=shapes,
        input_output_aliases={scalars: 0, scalars + 1: 2, scalars + 2: 1},
        compiler_params=compiler_params(qkv.dtype),
        name="gated_delta_chunked",
    )(at, zeros, memory, [qkv] * 3, [conv] * 3, [tail] * 3, gate_inputs, *constants)
    return out, ends, kept[:snapshots], *states


def _kernel(
    at, _, memory_ref, qkv_refs, conv_refs, tail_refs, gate_ref, rate_ref, bias_ref, *outputs_and_scratch, heads, all_heads
):
    out_ref, state_ref, snapshots_ref, *before_refs = outputs_and_scratch[:-6]
    window_ref, history_ref, gate_window_ref, placed_ref, merged_ref, semaphores = outputs_and_scratch[-6:]
    group, chunk = pl.program_id(0), pl.program_id(1)
    rows, first = at.rows[chunk], at.at[chunk]
    own_heads = pl.ds(group * heads, heads)

    def transfer(chunk, read=False):  # of the chunk's window, from or to the output
        lanes = pl.ds(pl.multiple_of(group * heads * LANES, LANES), heads * LANES)
        place = out_ref.at[pl.ds(pl.multiple_of(at.window[chunk], TILE), WINDOW), lanes]
        ends = (place, merged_ref) if read else (merged_ref, place)
        return pltpu.make_async_copy(*ends, semaphores.at[int(read)])

    @pl.when((at.index[chunk] == 0) & ((rows > 0) | (chunk == 0)))
    def _():
        state_ref[...] = memory_ref[...]
        for i, j in _blocks(heads):
            history_ref[i * heads + j] = tail_refs[i][0, :, _lanes(j)].astype(jnp.float32)

    previous = jnp.maximum(chunk - 1, 0)

    @pl.when((chunk > 0) & (at.rows[previous] > 0))
    def _():
        transfer(previous).wait()

    @pl.when(rows > 0)
    def _():
        transfer(chunk, read=True).start()
        for before_ref in before_refs:
            before_ref[...] = state_ref[...]
        _shift_in(qkv_refs, history_ref, window_ref, first, heads)
        gate_window_ref[:WINDOW] = gate_ref[...]
        real = jax.lax.broadcasted_iota(jnp.int32, (1, CHUNK, 1), 1) < rows
        q, k, v = (jnp.where(real, convolved(window_ref, conv_refs[i], i * heads, heads, BEFORE + first), 0.0) for i in range(3))
        decay, beta = gates(gate_window_ref[pl.ds(first, CHUNK)], rate_ref[...], bias_ref[...], real[0], group * heads, all_heads)
        q, k, dtype = normalised(q) * LANES**-0.5, normalised(k), merged_ref.dtype
        placed_ref[:, pl.ds(first, CHUNK)], state_ref[0] = chunk_forward(q, k, v, decay, beta, state_ref[0], heads, dtype)
        transfer(chunk, read=True).wait()
        _merge(placed_ref, merged_ref, first, rows)
        transfer(chunk).start()

    @pl.when((rows > 0) & (at.snapshot[chunk] >= 0))
    def _():
        pltpu.sync_copy(state_ref, snapshots_ref.at[pl.ds(at.snapshot[chunk], 1), own_heads])

    @pl.when((rows > 0) & (chunk == pl.num_programs(1) - 1))
    def _():
        transfer(chunk).wait()


def chunk_forward(q, k, v, decay, beta, state, heads, dtype):
    """One chunk: what its tokens read, and the memory after it; all float32, matrix operands cast to `dtype`.

    Args:
      q, k, v: [H, L, K] and [H, L, V]; zeros for tokens that are not real.
      decay: log of the decay from the chunk's start to each token, all heads in lanes [L, lanes].
      beta: writing strengths, all heads in lanes [L, lanes].
      state: the memory before the chunk, [H, V, K].
    """
    d, beta = columns(decay, heads), columns(beta, heads)
    between = fading(decay, heads)
    qk = jnp.concatenate([q, k], axis=1)  # one product of 128 rows costs the matrix unit less than two of 64
    by_key = dot("nik,njk->nij", qk, k, dtype)
    by_state = dot("nlk,nvk->nlv", qk, state, dtype)
    attention = by_key[:, :CHUNK] * between
    inverse = unit_inverse(by_key[:, CHUNK:] * between * beta, dtype)
    new = dot("nij,njv->niv", inverse, beta * (v - jnp.exp(d) * by_state[:, CHUNK:]), dtype)
    out = jnp.exp(d) * by_state[:, :CHUNK] + dot("nij,njv->niv", attention, new, dtype)
    last = d[:, CHUNK - 1 :]
    return out, state * jnp.exp(last) + dot("nlv,nlk->nvk", new, k * jnp.exp(last - d), dtype)


def columns(x, heads):
    """The first heads' lanes, each as a column: [L, lanes] to [H, L, 1]."""
    return jnp.stack([x[:, j : j + 1] for j in range(heads)])


def fading(decay, heads):
    """Decay from token j to token i >= j, zero above the diagonal: [H, L, L]."""
    rows, earlier = decay.T, lower_triangle(0)[None]
    between = jnp.stack([decay[:, n : n + 1] - rows[n : n + 1] for n in range(heads)])
    return jnp.where(earlier, jnp.exp(jnp.where(earlier, between, 0.0)), 0.0)


def _shift_in(qkv_refs, history_ref, window_ref, first, heads):
    """Puts the window's rows into scratch, with the three rows before the chunk in front of it; remembers its last three."""
    for i, j in _blocks(heads):
        window_ref[i * heads + j, BEFORE : BEFORE + WINDOW] = qkv_refs[i][:, _lanes(j)].astype(jnp.float32)
    inputs = history_ref.shape[1]
    window_ref[:, pl.ds(BEFORE + first - inputs, inputs)] = history_ref[...]
    history_ref[...] = window_ref[:, pl.ds(BEFORE + first + CHUNK - inputs, inputs)]


def _merge(placed_ref, merged_ref, first, rows):
    """Puts the chunk's rows over what the window held."""
    token = jax.lax.broadcasted_iota(jnp.int32, (WINDOW, 1), 0) - first
    own = (token >= 0) & (token < rows)
    for j in range(placed_ref.shape[0]):
        old = merged_ref[:, _lanes(j)].astype(jnp.float32)
        merged_ref[:, _lanes(j)] = jnp.where(own, placed_ref[j, :WINDOW], old).astype(merged_ref.dtype)


def _blocks(heads):
    return [(i, j) for i in range(3) for j in range(heads)]


def _lanes(j):
    return slice(j * LANES, (j + 1) * LANES)
