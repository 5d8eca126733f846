"""Forward pass of `chunked` on TPU, from the projections to the outputs.

Each grid step handles one chunk of a few heads. A sequence starts at any row, but copies move tiles of up to
16 rows. A chunk is therefore read and written in a window of 80 rows that starts on a tile. A store and a
load at different rows of a scratch buffer shift the tokens into place. The window's rows of other sequences
are read back and merged before the window is written. The write finishes before the next chunk reads, because
the grid walks the chunks in order. The recurrent state stays in on-chip memory from a sequence's first chunk
to its last.
Glossary: S sequences, T tokens, N heads, H heads of one step, K key width, V value width, L tokens of a
chunk, C channels, W conv width, P snapshots.
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
    LayerRows,
    compiler_params,
    convolved,
    dot,
    gates,
    lower_triangle,
    normalised,
    unit_inverse,
)

TILE = 16  # rows: bfloat16 is tiled by 16 rows on chip, float32 by 8
WINDOW = CHUNK + TILE  # holds a chunk at any start
LOOKBACK = 8  # rows of scratch before the window, for the convolution's earlier inputs


class ChunkWindows(NamedTuple):
    """Position of each chunk, as scalars that are known before the kernel starts.

    Attributes:
      sequence: the chunk's sequence; for padding, the last real chunk's.
      start: the first row of its window.
      offset: index of its first token in the window.
      num_tokens: its tokens; 0 for padding.
      index: 0 for a sequence's first chunk.
      snapshot: index of the snapshot taken at its end, or -1.
    """

    sequence: Int32[Array, " chunks"]
    start: Int32[Array, " chunks"]
    offset: Int32[Array, " chunks"]
    num_tokens: Int32[Array, " chunks"]
    index: Int32[Array, " chunks"]
    snapshot: Int32[Array, " chunks"]


def chunk_windows(
    query_starts: Int32[Array, " S"], query_lens: Int32[Array, " S"], snapshots: Int32[Array, "P 2"], tokens: int
) -> ChunkWindows:
    """Builds the chunk table for the kernels.

    `tokens` is the length of the row of tokens, a multiple of TILE and at least WINDOW.
    """
    table = chunk_table(query_starts, query_lens, tokens)
    last = jnp.max(jnp.where(table.num_tokens > 0, table.sequence, 0))
    sequence = jnp.where(table.num_tokens > 0, table.sequence, last)
    window = jnp.minimum(table.start // TILE * TILE, tokens - WINDOW)
    return ChunkWindows(
        sequence, window, table.start - window, table.num_tokens, table.index, snapshot_of_chunk(table, snapshots)
    )


def forward(
    qkv: Float[Array, "T C"],
    gate_inputs: Float32[Array, "T lanes"],
    layer: LayerRows,
    recurrent_state: Float32[Array, "S N V K"],
    conv_state: Float[Array, "S history C"],
    windows: ChunkWindows,
    snapshots: int,
    heads: int,
    save_states: bool = False,
) -> tuple[
    Float[Array, "T out"], Float32[Array, "S N V K"], Float32[Array, "P N V K"], *tuple[Float32[Array, "chunks N V K"], ...]
]:
    """Runs the kernel over all chunks.

    Args:
      gate_inputs: `a` of all heads, then `b` of all heads, then padding, in rows of 128.
      windows: the chunks.
      snapshots: number of snapshots.
      heads: heads of one grid step.
      save_states: return the state before each chunk, for the backward pass.

    Returns:
      The outputs, the state after each sequence, the snapshots, and with `save_states` the state before each
      chunk.
    """
    conv, rate, bias = layer
    T, (_, N, V, K), dtype = qkv.shape[0], recurrent_state.shape, qkv.dtype
    chunks, groups, width = windows.num_tokens.shape[0], N // heads, heads * LANES

    def window(columns, column):
        block = pl.Element(WINDOW), pl.Element(columns)
        return pl.BlockSpec(
            block, lambda h, c, windows: (pl.multiple_of(windows.start[c], TILE), pl.multiple_of(column(h), LANES))
        )

    def channels(i):  # of the step's queries, keys or values: rows, taps, conv state
        return (
            window(width, lambda h: (h + i * groups) * width),
            pl.BlockSpec((conv.shape[0], width), lambda h, c, windows: (0, h + i * groups)),
            pl.BlockSpec((1, conv_state.shape[1], width), lambda h, c, windows: (windows.sequence[c], 0, h + i * groups)),
        )

    rows, taps, tails = zip(*map(channels, range(3)), strict=True)
    constant = pl.BlockSpec((1, LANES), lambda h, c, windows: (0, 0))
    state = pl.BlockSpec((1, heads, V, K), lambda h, c, windows: (windows.sequence[c], h, 0, 0))
    by_chunk = pl.BlockSpec((1, heads, V, K), lambda h, c, windows: (c, h, 0, 0))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    shapes = [
        jax.ShapeDtypeStruct((T, N * V), dtype),
        jax.ShapeDtypeStruct(recurrent_state.shape, jnp.float32),
        jax.ShapeDtypeStruct((max(snapshots, 1), N, V, K), jnp.float32),  # kernels do not accept empty arrays
        *[jax.ShapeDtypeStruct((chunks, N, V, K), jnp.float32)] * save_states,
    ]
    zeros = [jnp.zeros(shapes[i].shape, shapes[i].dtype) for i in (0, 2)]
    constants, scalars = (rate, bias), len(windows)
    out, final_states, snapshot_states, *saved = pl.pallas_call(
        functools.partial(_kernel, heads=heads, all_heads=N),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(groups, chunks),
            in_specs=[[hbm, hbm], state, list(rows), list(taps), list(tails), window(LANES, lambda h: 0), constant, constant],
            out_specs=[hbm, state, hbm, *[by_chunk] * save_states],
            scratch_shapes=[
                pltpu.VMEM((3 * heads, LOOKBACK + WINDOW + CHUNK, LANES), jnp.float32),
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
    )(windows, zeros, recurrent_state, [qkv] * 3, [conv] * 3, [conv_state] * 3, gate_inputs, *constants)
    return out, final_states, snapshot_states[:snapshots], *saved


def _kernel(
    windows,
    _,
    initial_state_ref,
    qkv_refs,
    conv_refs,
    conv_state_refs,
    gate_ref,
    rate_ref,
    bias_ref,
    *outputs_and_scratch,
    heads,
    all_heads,
):
    out_ref, state_ref, snapshots_ref, *saved_state_refs = outputs_and_scratch[:-6]
    window_ref, history_ref, gate_window_ref, placed_ref, merged_ref, semaphores = outputs_and_scratch[-6:]
    group, chunk = pl.program_id(0), pl.program_id(1)
    num_tokens, first = windows.num_tokens[chunk], windows.offset[chunk]
    own_heads = pl.ds(group * heads, heads)

    def transfer(chunk, read=False):  # copies the chunk's window from or to the output
        lanes = pl.ds(pl.multiple_of(group * heads * LANES, LANES), heads * LANES)
        dst = out_ref.at[pl.ds(pl.multiple_of(windows.start[chunk], TILE), WINDOW), lanes]
        ends = (dst, merged_ref) if read else (merged_ref, dst)
        return pltpu.make_async_copy(*ends, semaphores.at[int(read)])

    @pl.when((windows.index[chunk] == 0) & ((num_tokens > 0) | (chunk == 0)))
    def _():
        state_ref[...] = initial_state_ref[...]
        for i, j in _head_indices(heads):
            history_ref[i * heads + j] = conv_state_refs[i][0, :, _lanes(j)].astype(jnp.float32)

    previous = jnp.maximum(chunk - 1, 0)

    @pl.when((chunk > 0) & (windows.num_tokens[previous] > 0))
    def _():
        transfer(previous).wait()

    @pl.when(num_tokens > 0)
    def _():
        transfer(chunk, read=True).start()
        for saved_state_ref in saved_state_refs:
            saved_state_ref[...] = state_ref[...]
        _shift_in(qkv_refs, history_ref, window_ref, first, heads)
        gate_window_ref[:WINDOW] = gate_ref[...]
        real = jax.lax.broadcasted_iota(jnp.int32, (1, CHUNK, 1), 1) < num_tokens
        q, k, v = (
            jnp.where(real, convolved(window_ref, conv_refs[i], i * heads, heads, LOOKBACK + first), 0.0) for i in range(3)
        )
        decay, beta = gates(gate_window_ref[pl.ds(first, CHUNK)], rate_ref[...], bias_ref[...], real[0], group * heads, all_heads)
        q, k, dtype = normalised(q) * LANES**-0.5, normalised(k), merged_ref.dtype
        placed_ref[:, pl.ds(first, CHUNK)], state_ref[0] = chunk_forward(q, k, v, decay, beta, state_ref[0], heads, dtype)
        transfer(chunk, read=True).wait()
        _merge(placed_ref, merged_ref, first, num_tokens)
        transfer(chunk).start()

    @pl.when((num_tokens > 0) & (windows.snapshot[chunk] >= 0))
    def _():
        pltpu.sync_copy(state_ref, snapshots_ref.at[pl.ds(windows.snapshot[chunk], 1), own_heads])

    @pl.when((num_tokens > 0) & (chunk == pl.num_programs(1) - 1))
    def _():
        transfer(chunk).wait()


def chunk_forward(q, k, v, decay, beta, state, heads, dtype):
    """Returns the outputs of one chunk's tokens and the state after it.

    All is float32; matrix operands are cast to `dtype`.

    Args:
      q, k, v: [H, L, K] and [H, L, V]; zeros for rows without a token.
      decay: log of the decay from the chunk's start to each token, all heads in lanes [L, lanes].
      beta: writing strengths, all heads in lanes [L, lanes].
      state: the state before the chunk, [H, V, K].
    """
    d, beta = head_columns(decay, heads), head_columns(beta, heads)
    between = decay_matrix(decay, heads)
    qk = jnp.concatenate([q, k], axis=1)  # one product of 128 rows costs less than two of 64
    by_key = dot("nik,njk->nij", qk, k, dtype)
    by_state = dot("nlk,nvk->nlv", qk, state, dtype)
    attention = by_key[:, :CHUNK] * between
    inverse = unit_inverse(by_key[:, CHUNK:] * between * beta, dtype)
    new = dot("nij,njv->niv", inverse, beta * (v - jnp.exp(d) * by_state[:, CHUNK:]), dtype)
    out = jnp.exp(d) * by_state[:, :CHUNK] + dot("nij,njv->niv", attention, new, dtype)
    last = d[:, CHUNK - 1 :]
    return out, state * jnp.exp(last) + dot("nlv,nlk->nvk", new, k * jnp.exp(last - d), dtype)


def head_columns(x, heads):
    """Returns the first heads' lanes, each as a column: [L, lanes] to [H, L, 1]."""
    return jnp.stack([x[:, j : j + 1] for j in range(heads)])


def decay_matrix(decay, heads):
    """Returns the decay from token j to token i >= j, zero above the diagonal: [H, L, L]."""
    rows, earlier = decay.T, lower_triangle(0)[None]
    between = jnp.stack([decay[:, n : n + 1] - rows[n : n + 1] for n in range(heads)])
    return jnp.where(earlier, jnp.exp(jnp.where(earlier, between, 0.0)), 0.0)


def _shift_in(qkv_refs, history_ref, window_ref, first, heads):
    """Copies the window's rows into scratch, after the three rows before the chunk.

    Keeps the chunk's last three rows in `history_ref` for the next chunk.
    """
    for i, j in _head_indices(heads):
        window_ref[i * heads + j, LOOKBACK : LOOKBACK + WINDOW] = qkv_refs[i][:, _lanes(j)].astype(jnp.float32)
    inputs = history_ref.shape[1]
    window_ref[:, pl.ds(LOOKBACK + first - inputs, inputs)] = history_ref[...]
    history_ref[...] = window_ref[:, pl.ds(LOOKBACK + first + CHUNK - inputs, inputs)]


def _merge(placed_ref, merged_ref, first, num_tokens):
    """Overwrites the chunk's rows of the window; the window's other rows keep their values."""
    token = jax.lax.broadcasted_iota(jnp.int32, (WINDOW, 1), 0) - first
    own = (token >= 0) & (token < num_tokens)
    for j in range(placed_ref.shape[0]):
        old = merged_ref[:, _lanes(j)].astype(jnp.float32)
        merged_ref[:, _lanes(j)] = jnp.where(own, placed_ref[j, :WINDOW], old).astype(merged_ref.dtype)


def _head_indices(heads):
    return [(i, j) for i in range(3) for j in range(heads)]


def _lanes(j):
    return slice(j * LANES, (j + 1) * LANES)
