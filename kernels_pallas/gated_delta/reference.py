"""Reference of both operations in readable jnp, for any platform and any head width.

The kernels are compared with it. State and arithmetic are float32 for every input dtype, because a large
bfloat16 state loses small writes.
Glossary: S sequences or slots, T tokens, N value heads, K key width, V value width, L tokens of a chunk,
C channels, W conv width.
"""

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.gated_delta.arguments import ChunkedArguments
from kernels_pallas.gated_delta.packing import CHUNK, Chunks, chunk_table, snapshot_of_chunk

L2_EPS = 1e-6  # fixed in transformers' implementation, not a field of the checkpoint


def _dot(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, precision=Precision.HIGHEST, preferred_element_type=jnp.float32)


def chunked(
    arguments: ChunkedArguments,
) -> tuple[Float[Array, "T N V"], Float32[Array, "S N V K"], Float32[Array, "P N V K"]]:
    """Computes `api.chunked` without the conv states (arXiv:2412.06464, section 3.3).

    Inside a chunk the writes depend on each other through a unit lower-triangular system. The systems of all
    chunks are solved at once. Only the scan of the recurrent state over the chunks is sequential.
    """
    qkv, a, b, conv, a_log, dt_bias, recurrent_state, conv_state, query_starts, query_lens, snapshots = arguments
    T, (S, N, V, K) = qkv.shape[0], recurrent_state.shape
    table = chunk_table(query_starts, query_lens, T)
    rows, real = _token_rows(table)
    q, k, v = heads(_convolved_chunks(qkv, conv, conv_state, table), N, K, V)
    g, beta = chunk_gates(a, b, a_log, dt_bias, table)

    q, k, v, g, beta = (jnp.moveaxis(x, 1, 2) for x in (q, k, v, g, beta))  # [chunks, N, L, ...]
    decay = jnp.cumsum(g, axis=-1)  # log of the decay from the chunk's start to each token
    earlier = jnp.tril(jnp.ones((1, 1, CHUNK, CHUNK), bool))
    between = jnp.exp(jnp.where(earlier, decay[..., :, None] - decay[..., None, :], -jnp.inf))

    k_beta = k * beta[..., None]
    overlap = _dot("cnik,cnjk->cnij", k_beta, k) * between
    right = jnp.concatenate([v * beta[..., None], k_beta * jnp.exp(decay)[..., None]], axis=-1)
    solved = jax.lax.linalg.triangular_solve(overlap, right, left_side=True, lower=True, unit_diagonal=True)
    writes, reads = jnp.split(solved, [V], axis=-1)
    attention = _dot("cnik,cnjk->cnij", q, k) * between

    q_decayed = q * jnp.exp(decay)[..., None]
    k_decayed = k * jnp.exp(decay[..., -1:] - decay)[..., None]
    fade = jnp.exp(decay[..., -1])[..., None, None]
    snapshot = snapshot_of_chunk(table, snapshots)

    def scan_chunk(carry, chunk):
        current, final_states, snapshot_states = carry
        write, read, attend, q_out, k_in, fade, sequence, index, snapshot = chunk
        current = jnp.where(index == 0, recurrent_state[jnp.minimum(sequence, S - 1)], current)
        new_NLV = write - _dot("nlk,nvk->nlv", read, current)
        out_NLV = _dot("nlk,nvk->nlv", q_out, current) + _dot("nij,njv->niv", attend, new_NLV)
        current = current * fade + _dot("nlv,nlk->nvk", new_NLV, k_in)
        final_states = final_states.at[sequence].set(current, mode="drop")
        snapshot_states = snapshot_states.at[snapshot].set(current)  # chunks without a snapshot write to the extra last entry
        return (current, final_states, snapshot_states), out_NLV

    carry = (jnp.zeros((N, V, K)), recurrent_state, jnp.zeros((snapshots.shape[0] + 1, N, V, K)))
    terms = (writes, reads, attention, q_decayed, k_decayed, fade, table.sequence, table.index, snapshot)
    (_, final_states, snapshot_states), out = jax.lax.scan(scan_chunk, carry, terms)
    out = jnp.moveaxis(out, 1, 2).astype(qkv.dtype)  # [chunks, L, N, V]
    packed = jnp.zeros((T, N, V), qkv.dtype).at[jnp.where(real, rows, T)].set(out, mode="drop")
    return packed, final_states, snapshot_states[:-1]


def recurrent(
    qkv: Float[Array, "B T C"],
    a: Float[Array, "B T N"],
    b: Float[Array, "B T N"],
    z: Float[Array, "B T N V"],
    conv: Float[Array, "C W"],
    a_log: Float[Array, " N"],
    dt_bias: Float[Array, " N"],
    norm: Float[Array, " V"],
    eps: float,
    recurrent_state: Float32[Array, "S N V K"],
    conv_state: Float[Array, "S history C"],
    slots: Int32[Array, " B"],
    keep: Int32[Array, " B"],
) -> tuple[Float[Array, "B T N V"], Float32[Array, "S N V K"], Float[Array, "S history C"]]:
    """Computes `api.recurrent` token by token."""
    S, N, V, K = recurrent_state.shape
    T, history = qkv.shape[1], conv.shape[1] - 1
    active = slots >= 0
    own = jnp.clip(slots, 0, S - 1)
    window = jnp.concatenate([conv_state[own].astype(qkv.dtype), qkv], axis=1)
    q, k, v = heads(convolve(window, conv), N, K, V)
    g, beta = gates(a, b, a_log, dt_bias)
    state = kept_state = recurrent_state[own]
    out = []
    for t in range(T):
        state, read = _step(state, q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t])
        out.append(read)
        kept_state = jnp.where((t < keep)[:, None, None, None], state, kept_state)
    out = gated_norm(jnp.stack(out, axis=1).astype(z.dtype), z, norm, eps)
    out = jnp.where(active[:, None, None, None], out, jnp.zeros((), out.dtype))
    written = jnp.where(active, slots, S)
    last_inputs = jnp.take_along_axis(window, (keep[:, None] + jnp.arange(history)[None])[..., None], axis=1)
    recurrent_state = recurrent_state.at[written].set(kept_state, mode="drop")
    return out, recurrent_state, conv_state.at[written].set(last_inputs.astype(conv_state.dtype), mode="drop")


def _step(state_BNVK: Array, q_BNK: Array, k_BNK: Array, v_BNV: Array, g_BN: Array, beta_BN: Array) -> tuple[Array, Array]:
    """Updates the state, `S = exp(g) S + beta (v - exp(g) S k) k^T`, and reads it, `S q`."""
    state_BNVK = state_BNVK * jnp.exp(g_BN)[..., None, None]
    error_BNV = v_BNV - _dot("bnvk,bnk->bnv", state_BNVK, k_BNK)
    state_BNVK = state_BNVK + (beta_BN[..., None] * error_BNV)[..., None] * k_BNK[..., None, :]
    return state_BNVK, _dot("bnvk,bnk->bnv", state_BNVK, q_BNK)


def convolve(window: Float[Array, "... window C"], conv: Float[Array, "C W"]) -> Float[Array, "... T C"]:
    """Applies the depthwise causal convolution (oldest tap first), then SiLU.

    The arithmetic is float32. The result has the window's dtype and W - 1 rows fewer.
    """
    W = conv.shape[1]
    T = window.shape[-2] - (W - 1)
    taps = conv.astype(jnp.float32).reshape(*([1] * (window.ndim - 1)), *conv.shape)
    out = sum(window[..., i : i + T, :].astype(jnp.float32) * taps[..., i] for i in range(W))
    return jax.nn.silu(out).astype(window.dtype)


def heads(
    channels: Float[Array, "B T C"], value_heads: int, key_width: int, value_width: int
) -> tuple[Float32[Array, "B T N K"], Float32[Array, "B T N K"], Float32[Array, "B T N V"]]:
    """Splits the channels into normalised queries and keys, and values, per value head.

    Queries are scaled by K^-1/2. Value heads that share a key head get copies of its query and key.
    """
    leading, C = channels.shape[:-1], channels.shape[-1]
    keys = (C - value_heads * value_width) // 2
    q, k, v = jnp.split(channels.astype(jnp.float32), [keys, 2 * keys], axis=-1)
    q, k = (normalised(x.reshape(*leading, -1, key_width)) for x in (q, k))
    shared = value_heads * key_width // keys
    q, k = (jnp.repeat(x, shared, axis=-2) for x in (q * key_width**-0.5, k))
    return q, k, v.reshape(*leading, value_heads, value_width)


def normalised(x: Float32[Array, "... K"]) -> Float32[Array, "... K"]:
    """Returns `x / sqrt(sum x^2 + eps)` over the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2_EPS)


def gates(
    a: Float[Array, "B T N"], b: Float[Array, "B T N"], a_log: Float[Array, " N"], dt_bias: Float[Array, " N"]
) -> tuple[Float32[Array, "B T N"], Float32[Array, "B T N"]]:
    """Returns the log decay `-exp(a_log) softplus(a + dt_bias)` and the writing strength `sigmoid(b)`."""
    rate, bias = (x.astype(jnp.float32)[None, None] for x in (jnp.exp(a_log.astype(jnp.float32)), dt_bias))
    return -rate * jax.nn.softplus(a.astype(jnp.float32) + bias), jax.nn.sigmoid(b.astype(jnp.float32))


def chunk_gates(
    a: Float[Array, "T N"], b: Float[Array, "T N"], a_log: Float[Array, " N"], dt_bias: Float[Array, " N"], table: Chunks
) -> tuple[Float32[Array, "chunks L N"], Float32[Array, "chunks L N"]]:
    """Returns `gates` of every chunk's tokens.

    Both are 0 in rows past a chunk's end, so these rows leave the state unchanged.
    """
    rows, real = _token_rows(table)
    rows = jnp.clip(rows, 0, a.shape[0] - 1)
    g, beta = gates(a[rows], b[rows], a_log, dt_bias)
    return jnp.where(real[..., None], g, 0.0), jnp.where(real[..., None], beta, 0.0)


def gated_norm(
    x: Float[Array, "... V"], z: Float[Array, "... V"], weight: Float[Array, " V"], eps: float
) -> Float[Array, "... V"]:
    """Returns `x / rms(x) * w * silu(z)` per head, computed in float32, in z's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y * weight.astype(jnp.float32).reshape(*([1] * (y.ndim - 1)), -1)
    return (y * jax.nn.silu(z.astype(jnp.float32))).astype(z.dtype)


def _token_rows(table: Chunks) -> tuple[Int32[Array, "chunks L"], Array]:
    """Returns the token index of every row of each chunk, and whether the row has a token."""
    within = jnp.arange(CHUNK, dtype=jnp.int32)[None]
    return table.start[:, None] + within, within < table.num_tokens[:, None]


def _convolved_chunks(
    qkv: Float[Array, "T C"],
    conv: Float[Array, "C W"],
    conv_state: Float[Array, "S history C"],
    table: Chunks,
) -> Float[Array, "chunks L C"]:
    """Returns the chunks' channels after convolution. Conv states precede the sequences' first tokens."""
    history = conv_state.shape[1]
    own = jnp.minimum(table.sequence, conv_state.shape[0] - 1)
    before = jnp.arange(-history, 0, dtype=jnp.int32)[None]
    earlier = qkv[jnp.clip(table.start[:, None] + before, 0, qkv.shape[0] - 1)]
    earlier = jnp.where((table.index == 0)[:, None, None], conv_state[own].astype(qkv.dtype), earlier)
    chunk = qkv[jnp.clip(_token_rows(table)[0], 0, qkv.shape[0] - 1)]
    return convolve(jnp.concatenate([earlier, chunk], axis=1), conv)
