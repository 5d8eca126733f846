"""Backward pass of `chunked` on TPU.

A kernel computes the recursion over chunks, last to first. Element-wise parts are jnp. The only residuals are
the arguments. The backward pass projects the tokens again, and runs the forward kernel again for the state
before each chunk. It lays everything out by chunks, [chunks, L, ...]. A token is in at most one chunk, so
both directions are gathers.
Glossary: S sequences, T tokens, N heads, H heads of one step, K key width, V value width, L tokens of a
chunk, C channels, W conv width, P snapshots.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.gated_delta import reference
from kernels_pallas.gated_delta.backward import to_tokens
from kernels_pallas.gated_delta.packing import CHUNK, Chunks
from kernels_pallas.gated_delta.tpu_chunked import ChunkWindows, decay_matrix, head_columns
from kernels_pallas.gated_delta.tpu_math import LANES, compiler_params, cumulated, dot, lower_triangle, unit_inverse


def positions(table: Chunks, rows: Int32[Array, "chunks L"], tokens: int) -> Int32[Array, " T"]:
    """Returns each token's position in its sequence; -1 for tokens of no sequence."""
    within = table.index[:, None] * CHUNK + jnp.arange(1, CHUNK + 1, dtype=jnp.int32)[None]
    return to_tokens(within, rows, tokens) - 1


def project(
    qkv: Float[Array, "T C"],
    a: Float[Array, "T N"],
    b: Float[Array, "T N"],
    conv: Float[Array, "C W"],
    a_log: Float[Array, " N"],
    dt_bias: Float[Array, " N"],
    conv_state: Float[Array, "S history C"],
    query_starts: Int32[Array, " S"],
    query_lens: Int32[Array, " S"],
    position: Int32[Array, " T"],
) -> tuple[Float32[Array, "T C"], Float32[Array, "T N"], Float32[Array, "T N"]]:
    """Projects the tokens to float32 inputs of the rule.

    The convolution runs over the row of tokens and masks inputs before a token's own sequence. The conv state
    is then added for the first W - 1 tokens of each sequence.

    Returns:
      Normalised queries, keys and values side by side, log decays, and writing strengths.
    """
    (T, C), W, N, inputs = qkv.shape, conv.shape[1], a.shape[1], conv_state.shape[1]
    taps, x, history = conv.astype(jnp.float32).T, qkv.astype(jnp.float32), conv_state.astype(jnp.float32)
    linear = jnp.zeros((T, C), jnp.float32)
    for back in range(W):
        shifted = jnp.pad(x, ((back, 0), (0, 0)))[:T]
        linear += jnp.where((position >= back)[:, None], shifted, 0.0) * taps[W - 1 - back][None]
    for i in range(inputs):
        seen = sum(history[:, inputs + i - back] * taps[W - 1 - back][None] for back in range(i + 1, W))
        linear = linear.at[jnp.where(i < query_lens, query_starts + i, T)].add(seen, mode="drop")
    q, k, v = (y.reshape(T, -1) for y in reference.heads(jax.nn.silu(linear)[None], N, LANES, LANES))
    g, beta = reference.gates(a[None], b[None], a_log, dt_bias)
    return jnp.concatenate([q, k, v], axis=1), g[0], beta[0]


def backward(
    qkv: Float[Array, "chunks L C"],
    gates: Float32[Array, "chunks L lanes"],
    states: Float32[Array, "chunks N V K"],
    d_out: Float[Array, "chunks L out"],
    d_final_states: Float32[Array, "S N V K"],
    d_snapshots: Float32[Array, "P N V K"],
    windows: ChunkWindows,
    heads: int,
) -> tuple[Float[Array, "chunks L C"], Float32[Array, "chunks L N"], Float32[Array, "chunks L N"], Float32[Array, "S N V K"]]:
    """Runs the kernel over all chunks.

    Args:
      qkv: normalised queries, keys and values of each chunk; zeros where it has no token.
      gates: log decays, then writing strengths, all heads in lanes.
      states: the state before each chunk.
      d_out, d_final_states, d_snapshots: cotangents of the forward kernel's results.

    Returns:
      Cotangents of q, k and v side by side, of log decays, of writing strengths, and of the initial state.
    """
    (chunks, _, C), N = qkv.shape, states.shape[1]
    groups, width = N // heads, heads * LANES

    def channels(i):  # the step's heads of queries, keys or values
        return pl.BlockSpec((1, CHUNK, width), lambda h, c, windows: (chunks - 1 - c, 0, h + i * groups))

    by_chunk = pl.BlockSpec((1, CHUNK, LANES), lambda h, c, windows: (chunks - 1 - c, 0, 0))
    d_gates = pl.BlockSpec((1, CHUNK, LANES), lambda h, c, windows: (chunks - 1 - c, 0, h))
    before_chunk = pl.BlockSpec((1, heads, LANES, LANES), lambda h, c, windows: (chunks - 1 - c, h, 0, 0))
    recurrent_state = pl.BlockSpec((1, heads, LANES, LANES), lambda h, c, windows: (windows.sequence[chunks - 1 - c], h, 0, 0))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    part = jax.ShapeDtypeStruct((chunks, CHUNK, C // 3), qkv.dtype)
    *parts, d_gates, d_recurrent_state = pl.pallas_call(
        functools.partial(_kernel, heads=heads, all_heads=N),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(groups, chunks),
            in_specs=[[channels(i) for i in range(3)], by_chunk, before_chunk, channels(0), hbm, recurrent_state],
            out_specs=[channels(0), channels(0), channels(0), d_gates, recurrent_state],
            scratch_shapes=[pltpu.VMEM((1, heads, LANES, LANES), jnp.float32), pltpu.VMEM((1, heads, LANES, LANES), jnp.float32)],
        ),
        out_shape=[
            *[part] * 3,
            jax.ShapeDtypeStruct((chunks, CHUNK, groups * LANES), jnp.float32),
            jax.ShapeDtypeStruct(d_final_states.shape, jnp.float32),
        ],
        input_output_aliases={len(windows) + 7: 4},
        compiler_params=compiler_params(qkv.dtype),
        name="gated_delta_backward",
    )(windows, [qkv] * 3, gates, states, d_out, d_snapshots, d_final_states)
    by_group = d_gates.reshape(chunks, CHUNK, groups, LANES)
    d_g, d_beta = (by_group[..., i * heads : (i + 1) * heads].reshape(chunks, CHUNK, N) for i in range(2))
    return jnp.concatenate(parts, axis=-1), d_g, d_beta, d_recurrent_state


def _kernel(
    windows,
    qkv_refs,
    gates_ref,
    saved_state_ref,
    d_out_ref,
    d_snapshots_ref,
    d_final_states_ref,
    d_q_ref,
    d_k_ref,
    d_v_ref,
    d_gates_ref,
    d_recurrent_state_ref,
    d_state_ref,
    d_snapshot_ref,
    *,
    heads,
    all_heads,
):
    group, step, chunks = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    chunk = chunks - 1 - step
    later = jnp.minimum(chunk + 1, chunks - 1)
    real = windows.num_tokens[chunk] > 0
    # Whether the chunk is its sequence's last.
    is_last = (step == 0) | (windows.num_tokens[later] == 0) | (windows.index[later] == 0)

    @pl.when(~real & (step == 0))
    def _():  # written back if no sequence has a token
        d_recurrent_state_ref[...] = d_final_states_ref[...]

    @pl.when(real & is_last)
    def _():
        d_state_ref[...] = d_final_states_ref[...]

    @pl.when(real & (windows.snapshot[chunk] >= 0))
    def _():
        part = d_snapshots_ref.at[pl.ds(windows.snapshot[chunk], 1), pl.ds(group * heads, heads)]
        pltpu.sync_copy(part, d_snapshot_ref)
        d_state_ref[...] += d_snapshot_ref[...]

    @pl.when(real)
    def _():
        q, k, v = (_by_head(ref, heads) for ref in qkv_refs)
        decay = pltpu.roll(cumulated(gates_ref[0]), LANES - group * heads, 1)
        beta = pltpu.roll(gates_ref[0], LANES - all_heads - group * heads, 1)
        terms = q, k, v, decay, beta, saved_state_ref[0], _by_head(d_out_ref, heads), d_state_ref[0]
        d_q, d_k, d_v, d_decay, d_beta, d_state = chunk_backward(*terms, heads, d_q_ref.dtype)
        for ref, grad in ((d_q_ref, d_q), (d_k_ref, d_k), (d_v_ref, d_v)):
            for j in range(heads):
                ref[0, :, j * LANES : (j + 1) * LANES] = grad[j].astype(ref.dtype)
        d_gates_ref[0] = _in_lanes(d_decay, d_beta, heads)
        d_state_ref[0] = d_state

        @pl.when(windows.index[chunk] == 0)
        def _():
            d_recurrent_state_ref[0] = d_state


def chunk_backward(q, k, v, decay, beta, state, d_out, d_state, heads, dtype):
    """Transposes tpu_chunked.chunk_forward, whose steps it computes again.

    All is float32; matrix operands are cast to `dtype`.

    Args:
      q, k, v, decay, beta, state: as in tpu_chunked.chunk_forward.
      d_out: cotangent of the outputs, [H, L, V].
      d_state: cotangent of the state after the chunk, [H, V, K].

    Returns:
      Cotangents of q, k, v, of the cumulative log decay and of beta ([H, L, 1]), and of the state before the
      chunk.
    """
    d, beta = head_columns(decay, heads), head_columns(beta, heads)
    fade, last = jnp.exp(d), d[:, CHUNK - 1 :]
    between, strictly = decay_matrix(decay, heads), lower_triangle(1)[None]
    qk = jnp.concatenate([q, k], axis=1)
    by_key, by_state = dot("nik,njk->nij", qk, k, dtype), dot("nlk,nvk->nlv", qk, state, dtype)
    attention, overlap = by_key[:, :CHUNK] * between, by_key[:, CHUNK:] * between
    inverse = unit_inverse(overlap * beta, dtype)
    error = v - fade * by_state[:, CHUNK:]
    new = dot("nij,njv->niv", inverse, beta * error, dtype)
    k_in = k * jnp.exp(last - d)

    d_new = dot("nij,niv->njv", attention, d_out, dtype) + dot("nlk,nvk->nlv", k_in, d_state, dtype)
    d_right = dot("nij,niv->njv", inverse, d_new, dtype)
    d_attention = dot("niv,njv->nij", d_out, new, dtype) * between
    d_overlap = jnp.where(strictly, -dot("niv,njv->nij", d_right, new, dtype), 0.0)
    d_key = d_overlap * between * beta
    d_by_state = jnp.concatenate([fade * d_out, -beta * fade * d_right], axis=1)
    d_qk = dot("nlv,nvk->nlk", d_by_state, state, dtype)
    d_k_in = dot("nlv,nvk->nlk", new, d_state, dtype) * jnp.exp(last - d)

    d_q = d_qk[:, :CHUNK] + dot("nij,njk->nik", d_attention, k, dtype)
    d_k = d_qk[:, CHUNK:] + d_k_in + dot("nij,njk->nik", d_key + d_key.swapaxes(1, 2), k, dtype)
    d_k += dot("nij,nik->njk", d_attention, q, dtype)
    d_beta = _sum(d_right * error) + _sum(d_overlap * overlap)

    pairs = d_attention * by_key[:, :CHUNK] + d_overlap * overlap * beta
    written = _sum(k * d_k_in)
    d_decay = _sum(pairs - pairs.swapaxes(1, 2)) - written + _sum(d_by_state[:, :CHUNK] * by_state[:, :CHUNK])
    d_decay += _sum(d_by_state[:, CHUNK:] * by_state[:, CHUNK:])
    whole = jnp.sum(written, axis=1, keepdims=True) + jnp.exp(last) * jnp.sum(_sum(d_state * state), axis=1, keepdims=True)
    token = jax.lax.broadcasted_iota(jnp.int32, (1, CHUNK, 1), 1)
    d_decay += jnp.where(token == CHUNK - 1, whole, 0.0)
    d_state = jnp.exp(last) * d_state + dot("nlv,nlk->nvk", d_by_state, qk, dtype)
    return d_q, d_k, beta * d_right, d_decay, d_beta, d_state


def _sum(x):
    return jnp.sum(x, axis=2, keepdims=True)


def _by_head(ref, heads):
    return jnp.stack([ref[0, :, j * LANES : (j + 1) * LANES].astype(jnp.float32) for j in range(heads)])


def _in_lanes(d_decay, d_beta, heads):
    """Returns cotangents of the log decays, summed from the chunk's end, then of the strengths.

    The step's heads are in lanes.
    """
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    decays = strengths = jnp.zeros((CHUNK, LANES), jnp.float32)
    for j in range(heads):
        decays = jnp.where(lane == j, d_decay[j], decays)
        strengths = jnp.where(lane == heads + j, d_beta[j], strengths)
    return dot("ij,in->jn", lower_triangle(0).astype(jnp.float32), decays, jnp.float32) + strengths
