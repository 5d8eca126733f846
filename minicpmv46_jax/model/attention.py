"""Gated full attention of the text backbone (transformers: models/qwen3_5, Qwen3_5Attention).

Quirks: `q_proj` gives each head its query and then its output gate (`[head, 2, head_dim]`). q and k pass a
zero-centred RMSNorm per head before rotary. Rotary acts on the first `rotary_dim` of `head_dim`, in halves.
The output is multiplied by sigmoid(gate).
Keys and values are stored in pages of 64 tokens.
Glossary: P pages, T tokens, D width, N query heads, K key-value heads, G query heads per key-value head, H
head width; B sequences of L tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.causal_attention import causal_attention
from kernels_pallas.paged_attention import PAGE, paged_attention
from minicpmv46_jax.config import TextConfig
from minicpmv46_jax.model.batch import Batch, DecodeBatch, FullBatch, PackedBatch, PrefillBatch, scatter_index
from minicpmv46_jax.model.layer_state import LayerState
from minicpmv46_jax.model.layers import Linear, RMSNorm, matmul_precision
from minicpmv46_jax.trees import tree_dataclass

QUERY_BLOCK = 128  # queries scored at once in `dense_attention`: all 262,144 at once would make terabytes of scores


@tree_dataclass
class KeyValues(LayerState):
    """Keys and values of one full-attention layer; a token's heads are concatenated."""

    keys: Float[Array, "P page KH"]
    values: Float[Array, "P page KH"]

    @classmethod
    def empty(cls, config: TextConfig, *, pages: int, slots: int, dtype: jnp.dtype) -> "KeyValues":
        """Creates `pages` pages of zeros."""
        shape = (pages, PAGE, config.num_key_value_heads * config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @classmethod
    def page_bytes(cls, config: TextConfig, itemsize: int) -> int:
        """Returns the bytes of one page."""
        return 2 * PAGE * config.num_key_value_heads * config.head_dim * itemsize

    def grow(self, pages: int) -> "KeyValues":
        """Grows to `pages` pages; new pages are zeros."""
        return jax.tree.map(lambda x: jnp.pad(x, [(0, pages - x.shape[0]), (0, 0), (0, 0)]), self)

    def offload_pages(self, pages: Int32[Array, " P"]) -> "KeyValues":
        """Returns a copy of these pages; entries for page -1 are undefined."""
        sources = jnp.maximum(pages, 0)
        return jax.tree.map(lambda x: x[sources], self)

    def restore_pages(self, pages: Int32[Array, " P"], values: "KeyValues") -> "KeyValues":
        """Writes a copy made by `offload_pages` to these pages; skips page -1."""
        targets = scatter_index(pages, self.keys.shape[0])
        return jax.tree.map(lambda x, value: x.at[targets].set(value, mode="drop"), self, values)


class Attention(nnx.Module):
    """Grouped-query attention with per-head norms and a sigmoid output gate.

    `backend` selects the kernels, as in `kernels_pallas.paged_attention`.
    """

    def __init__(self, config: TextConfig, *, backend: str | None = None, rngs: nnx.Rngs):
        self.config, self.backend = config, backend
        N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(config.hidden_size, N * 2 * H, rngs=rngs)
        self.k_proj = Linear(config.hidden_size, K * H, rngs=rngs)
        self.v_proj = Linear(config.hidden_size, K * H, rngs=rngs)
        self.o_proj = Linear(N * H, config.hidden_size, rngs=rngs)
        self.q_norm = RMSNorm(H, config.rms_norm_eps)
        self.k_norm = RMSNorm(H, config.rms_norm_eps)

    def __call__(
        self, x: Float[Array, "T D"], state: KeyValues | None, batch: Batch
    ) -> tuple[Float[Array, "T D"], KeyValues | None]:
        c, T = self.config, x.shape[0]
        q, gate = jnp.split(self.q_proj(x).reshape(T, c.num_attention_heads, 2 * c.head_dim), 2, axis=-1)
        k = self.k_proj(x).reshape(T, c.num_key_value_heads, c.head_dim)
        v = self.v_proj(x).reshape(T, c.num_key_value_heads, c.head_dim)
        q, k = self.norm_and_rotate(q, k, batch.rope_positions(T))
        if isinstance(batch, FullBatch):
            out = dense_attention(q, k, v, batch.query_lens.shape[0])
        elif isinstance(batch, PackedBatch):
            q_rows, k_rows, v_rows = (x.reshape(*batch.segments.shape, *x.shape[1:]) for x in (q, k, v))
            out = causal_attention(q_rows, k_rows, v_rows, batch.segments, backend=self.backend).reshape(q.shape)
        else:
            state = write_pages(state, k, v, batch.cache_positions(T), batch.token_pages(T))
            out = self.attend_pages(q, state, batch)
        return self.o_proj((out * jax.nn.sigmoid(gate)).reshape(T, -1)), state

    def norm_and_rotate(
        self, q: Float[Array, "T N H"], k: Float[Array, "T K H"], rope_positions: Int32[Array, " T"]
    ) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"]]:
        """Applies the per-head norms and the rotary embedding to queries and keys."""
        rotary = rope_positions, self.config.rotary_dim, self.config.rope_theta
        return apply_rotary(self.q_norm(q), *rotary), apply_rotary(self.k_norm(k), *rotary)

    def attend_pages(
        self, q: Float[Array, "T N H"], state: KeyValues, batch: PrefillBatch | DecodeBatch
    ) -> Float[Array, "T N H"]:
        """Attends from each query to the pages of its sequence, up to the query's own position."""
        sequences = batch.block_tables, batch.query_starts, batch.query_lens, batch.context_lens
        return paged_attention(
            q, state.keys, state.values, *sequences, max_query_len=batch.max_query_len(q.shape[0]), backend=self.backend
        )


def apply_rotary(x: Float[Array, "T N H"], positions: Int32[Array, " T"], rotary_dim: int, theta: float) -> Float[Array, "T N H"]:
    """Applies the rotary position embedding (arXiv:2104.09864) to the first `rotary_dim` widths.

    Width i is paired with width i + rotary_dim/2. The angles are float32.
    """
    half = rotary_dim // 2
    frequency = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) * 2 / rotary_dim)
    angle = positions[:, None, None].astype(jnp.float32) * frequency[None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:rotary_dim].astype(jnp.float32)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., rotary_dim:]], axis=-1)


def write_pages(
    state: KeyValues,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    cache_positions: Int32[Array, " T"],
    pages: Int32[Array, " T"],
) -> KeyValues:
    """Writes each token's key and value at `cache_positions % PAGE` of its page; page -1 is dropped."""
    pages = scatter_index(pages, state.keys.shape[0])
    k, v = (x.reshape(x.shape[0], -1) for x in (k, v))
    return KeyValues(
        state.keys.at[pages, cache_positions % PAGE].set(k, mode="drop"),
        state.values.at[pages, cache_positions % PAGE].set(v, mode="drop"),
    )


def dense_attention(
    q: Float[Array, "T N H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"], sequences: int
) -> Float[Array, "T N H"]:
    """Attends causally inside each of `sequences` equally long sequences; softmax in float32."""
    (T, N, H), K = q.shape, k.shape[1]
    L = T // sequences
    k, v = (x.reshape(sequences, L, K, H) for x in (k, v))
    size = QUERY_BLOCK if L % QUERY_BLOCK == 0 else L
    blocks = q.reshape(sequences, -1, size, K, N // K, H).swapaxes(0, 1)
    positions = jnp.arange(L, dtype=jnp.int32).reshape(-1, size)
    out = jax.lax.map(lambda block: _attend_block(block[0], k, v, block[1]), (blocks, positions))
    return out.swapaxes(0, 1).reshape(T, N, H)


def _attend_block(
    q: Float[Array, "B l K G H"], k: Float[Array, "B L K H"], v: Float[Array, "B L K H"], positions: Int32[Array, " l"]
) -> Float[Array, "B l K G H"]:
    return _masked_attention(q, k, v, (jnp.arange(k.shape[1])[None] <= positions[:, None])[None])


def _masked_attention(
    q: Float[Array, "B l K G H"], k: Float[Array, "B L K H"], v: Float[Array, "B L K H"], visible: Bool[Array, "#B l L"]
) -> Float[Array, "B l K G H"]:
    """Attends from each query to its visible keys; each query needs at least one."""
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=precision)
