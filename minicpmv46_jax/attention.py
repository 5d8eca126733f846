"""Gated full attention of the text backbone (transformers: models/qwen3_5, Qwen3_5Attention).

Quirks: `q_proj` gives each head its query and then its output gate (`[head, 2, head_dim]`); q and k pass a zero-centred RMSNorm
per head before rotary; rotary turns only the first `rotary_dim` of `head_dim`, in halves; the output is multiplied by
sigmoid(gate).
Glossary: B batch, T tokens, S cache slots, D width, N query heads, K key-value heads, G query heads each, H head width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from minicpmv46_jax.config import TextConfig
from minicpmv46_jax.layers import Linear, RMSNorm, precise
from minicpmv46_jax.state import KeyValues

QUERY_BLOCK = 128  # queries scored at once: at 262,144 slots and 8 heads 1.1 GB of float32 scores, not 17 GB for 2,048


class Attention(nnx.Module):
    """Grouped-query attention with per-head norms and a sigmoid output gate."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.config = config
        N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(config.hidden_size, N * 2 * H, rngs=rngs)
        self.k_proj = Linear(config.hidden_size, K * H, rngs=rngs)
        self.v_proj = Linear(config.hidden_size, K * H, rngs=rngs)
        self.o_proj = Linear(N * H, config.hidden_size, rngs=rngs)
        self.q_norm = RMSNorm(H, config.rms_norm_eps)
        self.k_norm = RMSNorm(H, config.rms_norm_eps)

    def __call__(
        self, x: Float[Array, "B T D"], state: KeyValues, positions: Int32[Array, "B T"], num_valid: Int32[Array, " B"]
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        del num_valid  # padding lies behind every real query, and its slots are overwritten before anyone may see them
        c = self.config
        B, T, _ = x.shape
        q, gate = jnp.split(self.q_proj(x).reshape(B, T, c.num_attention_heads, 2 * c.head_dim), 2, axis=-1)
        k = self.k_proj(x).reshape(B, T, c.num_key_value_heads, c.head_dim)
        v = self.v_proj(x).reshape(B, T, c.num_key_value_heads, c.head_dim)
        q = rotate(self.q_norm(q), positions, c.rotary_dim, c.rope_theta)
        k = rotate(self.k_norm(k), positions, c.rotary_dim, c.rope_theta)
        state = write(state, k, v, positions)
        out = attend(q, state, positions) * jax.nn.sigmoid(gate)
        return self.o_proj(out.reshape(B, T, -1)), state


def rotate(x: Float[Array, "B T N H"], positions: Int32[Array, "B T"], rotary_dim: int, theta: float) -> Float[Array, "B T N H"]:
    """Rotary position embedding on the first `rotary_dim` widths, pairing width i with i + rotary_dim/2 (arXiv:2104.09864)."""
    half = rotary_dim // 2
    frequency = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) * 2 / rotary_dim)
    angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:rotary_dim].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., rotary_dim:]], axis=-1)


def write(state: KeyValues, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int32[Array, "B T"]) -> KeyValues:
    """Puts each token into the slot of its position; positions past the capacity (padding) are dropped."""
    rows = jnp.arange(k.shape[0])[:, None]
    return KeyValues(
        state.keys.at[rows, positions].set(k, mode="drop"),
        state.values.at[rows, positions].set(v, mode="drop"),
    )


def attend(q: Float[Array, "B T N H"], state: KeyValues, positions: Int32[Array, "B T"]) -> Float[Array, "B T N H"]:
    """Each query over the slots at or before its position; softmax in float32."""
    B, T, N, H = q.shape
    K = state.keys.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    if T <= QUERY_BLOCK or T % QUERY_BLOCK:
        return _attend_block(q, state, positions).reshape(B, T, N, H)
    blocks = q.reshape(B, -1, QUERY_BLOCK, K, N // K, H).swapaxes(0, 1)
    block_positions = positions.reshape(B, -1, QUERY_BLOCK).swapaxes(0, 1)
    out = jax.lax.map(lambda block: _attend_block(block[0], state, block[1]), (blocks, block_positions))
    return out.swapaxes(0, 1).reshape(B, T, N, H)


def _attend_block(q: Float[Array, "B T K G H"], state: KeyValues, positions: Int32[Array, "B T"]) -> Float[Array, "B T K G H"]:
    precision = precise(q.dtype)
    scale = q.shape[-1] ** -0.5
    scores = jnp.einsum("btkgh,bskh->bkgts", q, state.keys, precision=precision, preferred_element_type=jnp.float32) * scale
    seen_BTS = jnp.arange(state.keys.shape[1])[None, None] <= positions[..., None]
    scores = jnp.where(seen_BTS[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, state.values, precision=precision)
