"""The backward pass of `chunked` on TPU: the recursion over chunks, last to first, as a kernel; what is elementwise as jnp.

Nothing of the forward pass is kept but its arguments. The backward pass projects the tokens again, runs the forward kernel again
for the memory before each chunk, and lays everything out by chunks, [chunks, L, ...]: a token is in one chunk at most, so both
ways are gathers.
Glossary: S sequences, T tokens, N heads, H heads of one step, K key width, V value width, L tokens of a chunk, C channels,
W conv width, P snapshots.
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
from kernels_pallas.gated_delta.tpu_chunked import Places, columns, fading
from kernels_pallas.gated_delta.tpu_math import LANES, compiler_params, cumulated, dot, lower_triangle, unit_inverse


def positions(table: Chunks, rows: Int32[Array, "chunks L"], tokens: int) -> Int32[Array, " T"]:
    """Each token's place in its sequence; -1 for tokens of no sequence."""
    within = table.index[:, None] * CHUNK + jnp.arange(1, CHUNK + 1, dtype=jnp.int32)[None]
    return to_tokens(within, rows, tokens) - 1


def project(
    qkv: Float[Array, "T C"],
    a: Float[Array, "T N"],
    b: Float[Array, "T N"],
    conv: Float[Array, "C W"],
    a_log: Float[Array, " N"],
    dt_bias: Float[Array, " N"],
    tail: Float[Array, "S tail C"],
    starts: Int32[Array, " S"],
    lengths: Int32[Array, " S"],
    position: Int32[Array, " T"],
) -> tuple[Float32[Array, "T C"], Float32[Array, "T N"], Float32[Array, "T N"]]:
    """Normalised queries, keys and values side by side, log decays and writing strengths of a packed row; float32.

    The convolution is over the row, less what lies before a token's own sequence; the few tokens that see the tail get it added.
    """
    (T, C), W, N, inputs = qkv.shape, conv.shape[1], a.shape[1], tail.shape[1]
    taps, x, before = conv.astype(jnp.float32).T, qkv.astype(jnp.float32), tail.astype(jnp.float32)
    linear = jnp.zeros((T, C), jnp.float32)
    for back in range(W):
        shifted = jnp.pad(x, ((back, 0), (0, 0)))[:T]
        linear += jnp.where((position >= back)[:, None], shifted, 0.0) * taps[W - 1 - back][None]
    for i in range(inputs):
        seen = sum(before[:, inputs + i - back] * taps[W - 1 - back][None] for back in range(i + 1, W))
        linear = linear.at[jnp.where(i < lengths, starts + i, T)].add(seen, mode="drop")
    q, k, v = (y.reshape(T, -1) for y in reference.heads(jax.nn.silu(linear)[None], N, LANES, LANES))
    g, beta = reference.gates(a[None], b[None], a_log, dt_bias)
    return jnp.concatenate([q, k, v], axis=1), g[0], beta[0]


def backward(
    qkv: Float[Array, "chunks L C"],
    gates: Float32[Array, "chunks L lanes"],
    states: Float32[Array, "chunks N V K"],
    out_bar: Float[Array, "chunks L out"],
    ends_bar: Float32[Array, "S N V K"],
    kept_bar: Float32[Array, "P N V K"],
    at: Places,
    heads: int,
) -> tuple[Float[Array, "chunks L C"], Float32[Array, "chunks L N"], Float32[Array, "chunks L N"], Float32[Array, "S N V K"]]:
    """The kernel over all chunks: cotangents of q, k, v side by side, of log decays, of writing strengths, and of the memory.

    Args:
      qkv: normalised queries, keys and values of each chunk; zeros where it has no token.
      gates: log decays, then writing strengths, all heads in lanes.
      states: the memory before each chunk.
      out_bar, ends_bar, kept_bar: cotangents of what the forward kernel gives.
    """
    (chunks, _, C), N = qkv.shape, states.shape[1]
    groups, width = N // heads, heads * LANES

    def channels(i):  # the step's heads of queries, keys or values
        return pl.BlockSpec((1, CHUNK, width), lambda h, c, at: (chunks - 1 - c, 0, h + i * groups))

    by_chunk = pl.BlockSpec((1, CHUNK, LANES), lambda h, c, at: (chunks - 1 - c, 0, 0))
    gates_bar = pl.BlockSpec((1, CHUNK, LANES), lambda h, c, at: (chunks - 1 - c, 0, h))
    before = pl.BlockSpec((1, heads, LANES, LANES), lambda h, c, at: (chunks - 1 - c, h, 0, 0))
    memory = pl.BlockSpec((1, heads, LANES, LANES), lambda h, c, at: (at.sequence[chunks - 1 - c], h, 0, 0))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    part = jax.ShapeDtypeStruct((chunks, CHUNK, C // 3), qkv.dtype)
    *parts, gates_bar, memory_bar = pl.pallas_call(
        functools.partial(_kernel, heads=heads, all_heads=N),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(groups, chunks),
            in_specs=[[channels(i) for i in range(3)], by_chunk, before, channels(0), hbm, memory],
            out_specs=[channels(0), channels(0), channels(0), gates_bar, memory],
            scratch_shapes=[pltpu.VMEM((1, heads, LANES, LANES), jnp.float32), pltpu.VMEM((1, heads, LANES, LANES), jnp.float32)],
        ),
        out_shape=[
            *[part] * 3,
            jax.ShapeDtypeStruct((chunks, CHUNK, groups * LANES), jnp.float32),
            jax.ShapeDtypeStruct(ends_bar.shape, jnp.float32),
        ],
        input_output_aliases={len(at) + 7: 4},
        compiler_params=compiler_params(qkv.dtype),
        name="gated_delta_backward",
    )(at, [qkv] * 3, gates, states, out_bar, kept_bar, ends_bar)
    by_group = gates_bar.reshape(chunks, CHUNK, groups, LANES)
    g_bar, beta_bar = (by_group[..., i * heads : (i + 1) * heads].reshape(chunks, CHUNK, N) for i in range(2))
    return jnp.concatenate(parts, axis=-1), g_bar, beta_bar, memory_bar


def _kernel(
    at,
    qkv_refs,
    gates_ref,
    before_ref,
    out_bar_ref,
    kept_bar_ref,
    ends_bar_ref,
    q_bar_ref,
    k_bar_ref,
    v_bar_ref,
    gates_bar_ref,
    memory_bar_ref,
    state_bar_ref,
    kept_ref,
    *,
    heads,
    all_heads,
):
    group, step, chunks = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    chunk = chunks - 1 - step
    later = jnp.minimum(chunk + 1, chunks - 1)
    real = at.rows[chunk] > 0
    ends = (step == 0) | (at.rows[later] == 0) | (at.index[later] == 0)  # the chunk is its sequence's last

    @pl.when(~real & (step == 0))
    def _():  # if there is no token at all, this is what is written back
        memory_bar_ref[...] = ends_bar_ref[...]

    @pl.when(real & ends)
    def _():
        state_bar_ref[...] = ends_bar_ref[...]

    @pl.when(real & (at.snapshot[chunk] >= 0))
    def _():
        part = kept_bar_ref.at[pl.ds(at.snapshot[chunk], 1), pl.ds(group * heads, heads)]
        pltpu.sync_copy(part, kept_ref)
        state_bar_ref[...] += kept_ref[...]

    @pl.when(real)
    def _():
        q, k, v = (_by_head(ref, heads) for ref in qkv_refs)
        decay = pltpu.roll(cumulated(gates_ref[0]), LANES - group * heads, 1)
        beta = pltpu.roll(gates_ref[0], LANES - all_heads - group * heads, 1)
        terms = q, k, v, decay, beta, before_ref[0], _by_head(out_bar_ref, heads), state_bar_ref[0]
        q_bar, k_bar, v_bar, decay_bar, beta_bar, state_bar = chunk_backward(*terms, heads, q_bar_ref.dtype)
        for ref, bar in ((q_bar_ref, q_bar), (k_bar_ref, k_bar), (v_bar_ref, v_bar)):
            for j in range(heads):
                ref[0, :, j * LANES : (j + 1) * LANES] = bar[j].astype(ref.dtype)
        gates_bar_ref[0] = _in_lanes(decay_bar, beta_bar, heads)
        state_bar_ref[0] = state_bar

        @pl.when(at.index[chunk] == 0)
        def _():
            memory_bar_ref[0] = state_bar


def chunk_backward(q, k, v, decay, beta, state, out_bar, state_bar, heads, dtype):
    """The transpose of tpu_chunked.chunk_forward, whose steps it computes again; all float32, matrix operands cast to `dtype`.

    Args:
      q, k, v, decay, beta, state: as there.
      out_bar: cotangent of what the tokens read, [H, L, V].
      state_bar: cotangent of the memory after the chunk, [H, V, K].

    Returns:
      Cotangents of q, k, v, of the cumulated log decay and of beta, [H, L, 1], and of the memory before the chunk.
    """
    d, beta = columns(decay, heads), columns(beta, heads)
    fade, last = jnp.exp(d), d[:, CHUNK - 1 :]
    between, strictly = fading(decay, heads), lower_triangle(1)[None]
    qk = jnp.concatenate([q, k], axis=1)
    by_key, by_state = dot("nik,njk->nij", qk, k, dtype), dot("nlk,nvk->nlv", qk, state, dtype)
    attention, overlap = by_key[:, :CHUNK] * between, by_key[:, CHUNK:] * between
    inverse = unit_inverse(overlap * beta, dtype)
    error = v - fade * by_state[:, CHUNK:]
    new = dot("nij,njv->niv", inverse, beta * error, dtype)
    k_in = k * jnp.exp(last - d)

    new_bar = dot("nij,niv->njv", attention, out_bar, dtype) + dot("nlk,nvk->nlv", k_in, state_bar, dtype)
    right_bar = dot("nij,niv->njv", inverse, new_bar, dtype)
    attention_bar = dot("niv,njv->nij", out_bar, new, dtype) * between
    overlap_bar = jnp.where(strictly, -dot("niv,njv->nij", right_bar, new, dtype), 0.0)
    key_bar = overlap_bar * between * beta
    by_state_bar = jnp.concatenate([fade * out_bar, -beta * fade * right_bar], axis=1)
    qk_bar = dot("nlv,nvk->nlk", by_state_bar, state, dtype)
    k_in_bar = dot("nlv,nvk->nlk", new, state_bar, dtype) * jnp.exp(last - d)

    q_bar = qk_bar[:, :CHUNK] + dot("nij,njk->nik", attention_bar, k, dtype)
    k_bar = qk_bar[:, CHUNK:] + k_in_bar + dot("nij,njk->nik", key_bar + key_bar.swapaxes(1, 2), k, dtype)
    k_bar += dot("nij,nik->njk", attention_bar, q, dtype)
    beta_bar = _sum(right_bar * error) + _sum(overlap_bar * overlap)

    pairs = attention_bar * by_key[:, :CHUNK] + overlap_bar * overlap * beta
    written = _sum(k * k_in_bar)
    decay_bar = _sum(pairs - pairs.swapaxes(1, 2)) - written + _sum(by_state_bar[:, :CHUNK] * by_state[:, :CHUNK])
    decay_bar += _sum(by_state_bar[:, CHUNK:] * by_state[:, CHUNK:])
    whole = jnp.sum(written, axis=1, keepdims=True) + jnp.exp(last) * jnp.sum(_sum(state_bar * state), axis=1, keepdims=True)
    token = jax.lax.broadcasted_iota(jnp.int32, (1, CHUNK, 1), 1)
    decay_bar += jnp.where(token == CHUNK - 1, whole, 0.0)
    state_bar = jnp.exp(last) * state_bar + dot("nlv,nlk->nvk", by_state_bar, qk, dtype)
    return q_bar, k_bar, beta * right_bar, decay_bar, beta_bar, state_bar


def _sum(x):
    return jnp.sum(x, axis=2, keepdims=True)


def _by_head(ref, heads):
    return jnp.stack([ref[0, :, j * LANES : (j + 1) * LANES].astype(jnp.float32) for j in range(heads)])


def _in_lanes(decay_bar, beta_bar, heads):
    """Cotangents of the log decays, cumulated from the chunk's end, then of the strengths, the step's heads in lanes."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    decays = strengths = jnp.zeros((CHUNK, LANES), jnp.float32)
    for j in range(heads):
        decays = jnp.where(lane == j, decay_bar[j], decays)
        strengths = jnp.where(lane == heads + j, beta_bar[j], strengths)
    return dot("ij,in->jn", lower_triangle(0).astype(jnp.float32), decays, jnp.float32) + strengths
