"""The gated delta rule in readable jnp: the recurrence itself, its chunked form, and the causal convolution before both.

State and arithmetic are float32 whatever the inputs are: a bfloat16 state loses small writes once it has grown.
Glossary: B sequences, T tokens, N heads, K key width, V value width, L tokens in a chunk, C channels, W conv width.
"""

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Float32, Int

CHUNK = 64  # tokens; the tile of the WY form, and the grid on which a prefix may be cut without changing a bit

Tokens = Float[Array, "B T N W"]
Gates = Float32[Array, "B T N"]
State = Float32[Array, "B N K V"]


def _dot(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, precision=Precision.HIGHEST, preferred_element_type=jnp.float32)


def recurrent(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N V"],
    g: Gates,
    beta: Gates,
    state: State,
) -> tuple[Float32[Array, "B T N V"], State]:
    """Token by token: `S = exp(g) S + beta k (v - k^T exp(g) S)^T`, read as `q^T S`.

    Args:
      q, k: queries and keys, already normalised and scaled.
      v: values.
      g: log decay, <= 0.
      beta: writing strength in [0, 1]; a token with g = 0 and beta = 0 leaves the state as it was.
      state: the memory before the first token.

    Returns:
      What each token reads, and the state after the last.
    """

    def step(state, token):
        q_BNK, k_BNK, v_BNV, g_BN, beta_BN = token
        state = state * jnp.exp(g_BN)[..., None, None]
        error_BNV = v_BNV - _dot("bnk,bnkv->bnv", k_BNK, state)
        state = state + _dot("bnk,bnv->bnkv", k_BNK, beta_BN[..., None] * error_BNV)
        return state, _dot("bnk,bnkv->bnv", q_BNK, state)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x.astype(jnp.float32), 1, 0), (q, k, v, g, beta))
    state, out_TBNV = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(out_TBNV, 0, 1), state


def chunked(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N V"],
    g: Gates,
    beta: Gates,
    state: State,
) -> tuple[Float32[Array, "B T N V"], State]:
    """The same as `recurrent`, CHUNK tokens at a time, in matrix products (arXiv:2412.06464, section 3.3).

    Inside a chunk the writes depend on each other through a unit lower-triangular system, solved for all chunks at once;
    only the hand-over of the state from chunk to chunk is sequential. Arguments and results as `recurrent`.
    """
    T = q.shape[1]
    q, k, v, g, beta = (_to_chunks(x) for x in (q, k, v, g, beta))  # [chunks, B, N, L, ...]
    decay = jnp.cumsum(g, axis=-1)  # log of the decay from the chunk's start to each token
    earlier = jnp.tril(jnp.ones((1, 1, 1, CHUNK, CHUNK), bool))
    between = jnp.exp(jnp.where(earlier, decay[..., :, None] - decay[..., None, :], -jnp.inf))

    k_beta = k * beta[..., None]
    overlap = _dot("cbnik,cbnjk->cbnij", k_beta, k) * between
    right = jnp.concatenate([v * beta[..., None], k_beta * jnp.exp(decay)[..., None]], axis=-1)
    solved = jax.lax.linalg.triangular_solve(overlap, right, left_side=True, lower=True, unit_diagonal=True)
    writes, reads = jnp.split(solved, [v.shape[-1]], axis=-1)
    attention = _dot("cbnik,cbnjk->cbnij", q, k) * between

    q_decayed = q * jnp.exp(decay)[..., None]
    k_decayed = k * jnp.exp(decay[..., -1:] - decay)[..., None]
    state_decay = jnp.exp(decay[..., -1])[..., None, None]

    def hand_over(state, chunk):
        write, read, attend, q_out, k_in, fade = chunk
        new_BNLV = write - _dot("bnlk,bnkv->bnlv", read, state)
        out_BNLV = _dot("bnlk,bnkv->bnlv", q_out, state) + _dot("bnij,bnjv->bniv", attend, new_BNLV)
        return state * fade + _dot("bnlk,bnlv->bnkv", k_in, new_BNLV), out_BNLV

    state, out = jax.lax.scan(hand_over, state, (writes, reads, attention, q_decayed, k_decayed, state_decay))
    chunks, B, N, L, V = out.shape
    return out.transpose(1, 0, 3, 2, 4).reshape(B, chunks * L, N, V)[:, :T], state


def _to_chunks(x: Float[Array, "B T N ..."]) -> Float32[Array, "chunks B N L ..."]:
    """float32, padded with tokens that change nothing (g = beta = 0), cut into chunks, heads before tokens."""
    B, T = x.shape[:2]
    x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, -T % CHUNK)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(B, -1, CHUNK, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def causal_conv(
    x: Float[Array, "B T C"],
    weight: Float[Array, "C W"],
    tail: Float[Array, "B tail C"],
    num_valid: Int[Array, " B"],
) -> tuple[Float[Array, "B T C"], Float[Array, "B tail C"]]:
    """Depthwise convolution over the last W tokens, then SiLU; the tail carries the W - 1 inputs before the block.

    Args:
      x: the inputs; of each row the first `num_valid` are real.
      weight: one filter a channel, oldest tap first; no bias.
      tail: the W - 1 inputs that came before x.
      num_valid: real tokens in each row.

    Returns:
      The activated outputs in x's dtype, and the tail after each row's last real token.
    """
    T, W = x.shape[1], weight.shape[1]
    x = jnp.concatenate([tail, x], axis=1)
    taps = weight.astype(jnp.float32)[None, None]
    out = sum(x[:, i : i + T].astype(jnp.float32) * taps[..., i] for i in range(W))
    ends = num_valid[:, None] + jnp.arange(W - 1)[None]
    new_tail = jnp.take_along_axis(x, ends[..., None], axis=1)
    return jax.nn.silu(out).astype(tail.dtype), new_tail
