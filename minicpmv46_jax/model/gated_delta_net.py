"""Gated delta net: the linear attention of 18 of the 24 layers (arXiv:2412.06464; transformers: Qwen3_5GatedDeltaNet).

Quirks: q, k and v pass one causal depthwise convolution and SiLU; q and k are L2-normalised per head, q scaled by K^-1/2; gates,
memory and their arithmetic are float32 always; the output norm multiplies by `w` (not `1 + w`) and then by silu(z). All of it
but the projections is `kernels_pallas.gated_delta`.
Glossary: T tokens, S sequences, D width, N heads, K key width, V value width, C channels of q, k and v together.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas import gated_delta
from minicpmv46_jax.config import TextConfig
from minicpmv46_jax.model.batch import Batch, DecodeBatch, FullBatch, PackedBatch, PrefillBatch, scatter_index
from minicpmv46_jax.model.layers import Linear, normal_init
from minicpmv46_jax.model.state import GatedDeltaState


class GatedDeltaNet(nnx.Module):
    """Token mixer with a memory of fixed size: chunked over a prompt, one step a token in decoding.

    `backend` says who runs the rule: see `kernels_pallas.gated_delta.chunked`.
    """

    def __init__(self, config: TextConfig, *, backend: str | None = None, rngs: nnx.Rngs):
        self.config, self.backend = config, backend
        D, N = config.hidden_size, config.linear_num_value_heads
        self.in_proj_qkv = Linear(D, config.linear_conv_dim, rngs=rngs)
        self.in_proj_z = Linear(D, config.linear_value_dim, rngs=rngs)
        self.in_proj_b = Linear(D, N, rngs=rngs)
        self.in_proj_a = Linear(D, N, rngs=rngs)
        self.conv = nnx.Param(normal_init(rngs.params(), (config.linear_conv_dim, config.linear_conv_kernel_dim)))
        self.dt_bias = nnx.Param(jnp.ones(N))
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (N,), minval=0.01, maxval=16.0)))
        self.norm = GatedRMSNorm(config.linear_value_head_dim, config.rms_norm_eps)
        self.out_proj = Linear(config.linear_value_dim, D, rngs=rngs)

    def __call__(
        self, x: Float[Array, "T D"], state: GatedDeltaState | None, batch: Batch
    ) -> tuple[Float[Array, "T D"], GatedDeltaState | None]:
        T = x.shape[0]
        z = self.in_proj_z(x).reshape(T, self.config.linear_num_value_heads, -1)
        projected = self.in_proj_qkv(x), self.in_proj_a(x), self.in_proj_b(x)
        if isinstance(batch, DecodeBatch):
            out, state = self.step(*projected, z, state, batch)
        elif isinstance(batch, PackedBatch):
            out = self.norm(self.packed(*projected, batch), z)
        else:
            out, state = self.whole(*projected, batch) if isinstance(batch, FullBatch) else self.read(*projected, state, batch)
            real = batch.real(T)[:, None, None]  # other tokens' outputs may be anything, NaN too
            out = self.norm(jnp.where(real, out, jnp.zeros((), out.dtype)), z)
        return self.out_proj(out.reshape(T, -1)), state

    def whole(
        self, qkv: Float[Array, "T C"], a: Float[Array, "T N"], b: Float[Array, "T N"], batch: FullBatch
    ) -> tuple[Float[Array, "T N V"], None]:
        """Sequences from nothing, and nothing kept."""
        c, S = self.config, batch.query_lens.shape[0]
        recurrent_state = jnp.zeros((S, c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim))
        conv_state = jnp.zeros((S, c.linear_conv_kernel_dim - 1, c.linear_conv_dim), qkv.dtype)
        query_starts = qkv.shape[0] // S * jnp.arange(S, dtype=jnp.int32)
        return gated_delta.chunked(
            qkv, a, b, self.layer, recurrent_state, conv_state, query_starts, batch.query_lens, backend=self.backend
        ).out, None

    def packed(
        self, qkv: Float[Array, "T C"], a: Float[Array, "T N"], b: Float[Array, "T N"], batch: PackedBatch
    ) -> Float[Array, "T N V"]:
        """Sequences from nothing, several in a row, and nothing kept."""
        c, rows = self.config, batch.segments.shape
        qkv, a, b = (x.reshape(*rows, -1) for x in (qkv, a, b))
        widths = c.linear_key_head_dim, c.linear_value_head_dim
        out = gated_delta.packed(qkv, a, b, self.layer, batch.segments, *widths, backend=self.backend)
        return out.reshape(-1, *out.shape[2:])

    def read(
        self,
        qkv: Float[Array, "T C"],
        a: Float[Array, "T N"],
        b: Float[Array, "T N"],
        state: GatedDeltaState,
        batch: PrefillBatch,
    ) -> tuple[Float[Array, "T N V"], GatedDeltaState]:
        """Pieces of prompts, each from where its source left off; ends and snapshots go to their slots."""
        begun = (batch.source_slots >= 0)[:, None, None]
        source = jnp.maximum(batch.source_slots, 0)
        recurrent_state = jnp.where(begun[..., None], state.recurrent_state[source], 0.0)
        conv_state = jnp.where(begun, state.conv_state[source], jnp.zeros((), state.conv_state.dtype))
        where = batch.query_starts, batch.query_lens, batch.snapshots
        read = gated_delta.chunked(qkv, a, b, self.layer, recurrent_state, conv_state, *where, backend=self.backend)
        kept = scatter_index(jnp.concatenate([batch.slots, batch.snapshot_slots]), state.recurrent_state.shape[0])
        return read.out, GatedDeltaState(
            state.recurrent_state.at[kept].set(jnp.concatenate([read.recurrent_state, read.snapshots]), mode="drop"),
            state.conv_state.at[kept].set(jnp.concatenate([read.conv_state, read.snapshot_conv_states]), mode="drop"),
        )

    def step(
        self,
        qkv: Float[Array, "T C"],
        a: Float[Array, "T N"],
        b: Float[Array, "T N"],
        z: Float[Array, "T N V"],
        state: GatedDeltaState,
        batch: DecodeBatch,
    ) -> tuple[Float[Array, "T N V"], GatedDeltaState]:
        """One token of each sequence."""
        qkv, a, b, z = (x[:, None] for x in (qkv, a, b, z))
        norm, keep = (self.norm.weight[...], self.norm.eps), jnp.ones_like(batch.slots)
        out, recurrent_state, conv_state = gated_delta.recurrent(
            qkv, a, b, z, self.layer, *norm, state.recurrent_state, state.conv_state, batch.slots, keep, backend=self.backend
        )
        return out[:, 0], GatedDeltaState(recurrent_state, conv_state)

    @property
    def layer(self) -> gated_delta.Layer:
        """What the rule needs of this layer's parameters."""
        return gated_delta.Layer(self.conv[...], self.A_log[...], self.dt_bias[...])


class GatedRMSNorm(nnx.Module):
    """`x / rms(x) * w * silu(z)`, per head."""

    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "... V"], z: Float[Array, "... V"]) -> Float[Array, "... V"]:
        return gated_delta.gated_norm(x, z, self.weight[...], self.eps)
