"""Gated delta net, the linear attention of 18 of the 24 layers.

Source: arXiv:2412.06464; transformers Qwen3_5GatedDeltaNet.

Quirks: q, k and v pass one causal depthwise convolution and SiLU. q and k are L2-normalised per head, and q
is scaled by K^-1/2. Gates, the recurrent state and their arithmetic are always float32. The output norm
multiplies by `w` (not `1 + w`) and then by silu(z). `kernels_pallas.gated_delta` computes everything except
the projections.
Glossary: s slots, T tokens, S sequences, D width, N heads, K key width, V value width, C channels of q, k and
v.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas import gated_delta
from minicpmv46_jax.config import TextConfig
from minicpmv46_jax.model.batch import Batch, DecodeBatch, FullBatch, PackedBatch, PrefillBatch, scatter_index
from minicpmv46_jax.model.layer_state import LayerState
from minicpmv46_jax.model.layers import Linear, normal_init
from minicpmv46_jax.trees import tree_dataclass


@tree_dataclass
class GatedDeltaState(LayerState):
    """Recurrent and conv state of one gated-delta layer; its size is independent of sequence lengths."""

    recurrent_state: Float32[Array, "s N V K"]
    conv_state: Float[Array, "s tail C"]

    @classmethod
    def empty(cls, config: TextConfig, *, pages: int, slots: int, dtype: jnp.dtype) -> "GatedDeltaState":
        """Creates `slots` slots of zeros; the recurrent state is always float32."""
        recurrent_shape = (slots, config.linear_num_value_heads, config.linear_value_head_dim, config.linear_key_head_dim)
        conv_shape = (slots, config.linear_conv_kernel_dim - 1, config.linear_conv_dim)
        return cls(jnp.zeros(recurrent_shape, jnp.float32), jnp.zeros(conv_shape, dtype))

    @classmethod
    def slot_bytes(cls, config: TextConfig, itemsize: int) -> int:
        """Returns the bytes of one slot; the recurrent state is always float32."""
        recurrent_bytes = config.linear_num_value_heads * config.linear_value_head_dim * config.linear_key_head_dim * 4
        return recurrent_bytes + (config.linear_conv_kernel_dim - 1) * config.linear_conv_dim * itemsize

    def offload_slot(self, slot: Int32[Array, ""]) -> "GatedDeltaState":
        """Returns a copy of a slot."""
        return jax.tree.map(lambda x: x[slot], self)

    def restore_slot(self, slot: Int32[Array, ""], values: "GatedDeltaState") -> "GatedDeltaState":
        """Writes a copy made by `offload_slot` to a slot."""
        return jax.tree.map(lambda x, value: x.at[slot].set(value), self, values)


class GatedDeltaNet(nnx.Module):
    """Token mixer with a recurrent state of fixed size.

    Prefill runs the chunked kernel, decode one recurrent step per token.

    `backend` selects the kernels, as in `kernels_pallas.gated_delta.chunked`.
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
            out, state = self.run_decode(*projected, z, state, batch)
        elif isinstance(batch, PackedBatch):
            out = self.norm(self.run_packed(*projected, batch), z)
        else:
            if isinstance(batch, FullBatch):
                out, state = self.run_full(*projected, batch), None
            else:
                out, state = self.run_prefill(*projected, state, batch)
            valid = batch.valid(T)[:, None, None]  # the kernel leaves padding undefined, NaN included
            out = self.norm(jnp.where(valid, out, jnp.zeros((), out.dtype)), z)
        return self.out_proj(out.reshape(T, -1)), state

    def run_full(
        self, qkv: Float[Array, "T C"], a: Float[Array, "T N"], b: Float[Array, "T N"], batch: FullBatch
    ) -> Float[Array, "T N V"]:
        """Runs complete sequences from a zero state and discards the final state."""
        S = batch.query_lens.shape[0]
        state = GatedDeltaState.empty(self.config, pages=0, slots=S, dtype=qkv.dtype)
        query_starts = qkv.shape[0] // S * jnp.arange(S, dtype=jnp.int32)
        sequences = query_starts, batch.query_lens
        return gated_delta.chunked(
            qkv, a, b, self.kernel_params, state.recurrent_state, state.conv_state, *sequences, backend=self.backend
        ).out

    def run_packed(
        self, qkv: Float[Array, "T C"], a: Float[Array, "T N"], b: Float[Array, "T N"], batch: PackedBatch
    ) -> Float[Array, "T N V"]:
        """Runs complete sequences, several per row, from a zero state and discards the final states."""
        c, rows = self.config, batch.segments.shape
        qkv, a, b = (x.reshape(*rows, -1) for x in (qkv, a, b))
        widths = c.linear_key_head_dim, c.linear_value_head_dim
        out = gated_delta.packed(qkv, a, b, self.kernel_params, batch.segments, *widths, backend=self.backend)
        return out.reshape(-1, *out.shape[2:])

    def run_prefill(
        self,
        qkv: Float[Array, "T C"],
        a: Float[Array, "T N"],
        b: Float[Array, "T N"],
        state: GatedDeltaState,
        batch: PrefillBatch,
    ) -> tuple[Float[Array, "T N V"], GatedDeltaState]:
        """Runs chunks of prompts, each from its source slot.

        Writes final states and snapshots to their slots.
        """
        has_source = (batch.source_slots >= 0)[:, None, None]
        source = jnp.maximum(batch.source_slots, 0)
        recurrent_state = jnp.where(has_source[..., None], state.recurrent_state[source], 0.0)
        conv_state = jnp.where(has_source, state.conv_state[source], jnp.zeros((), state.conv_state.dtype))
        sequences = batch.query_starts, batch.query_lens, batch.snapshots
        after = gated_delta.chunked(qkv, a, b, self.kernel_params, recurrent_state, conv_state, *sequences, backend=self.backend)
        to = scatter_index(jnp.concatenate([batch.slots, batch.snapshot_slots]), state.recurrent_state.shape[0])
        return after.out, GatedDeltaState(
            state.recurrent_state.at[to].set(jnp.concatenate([after.recurrent_state, after.snapshots]), mode="drop"),
            state.conv_state.at[to].set(jnp.concatenate([after.conv_state, after.snapshot_conv_states]), mode="drop"),
        )

    def run_decode(
        self,
        qkv: Float[Array, "T C"],
        a: Float[Array, "T N"],
        b: Float[Array, "T N"],
        z: Float[Array, "T N V"],
        state: GatedDeltaState,
        batch: DecodeBatch,
    ) -> tuple[Float[Array, "T N V"], GatedDeltaState]:
        """Runs one token of each sequence, the output norm included."""
        qkv, a, b, z = (x[:, None] for x in (qkv, a, b, z))
        norm, keep = (self.norm.weight[...], self.norm.eps), jnp.ones_like(batch.slots)
        states = state.recurrent_state, state.conv_state
        out, recurrent_state, conv_state = gated_delta.recurrent(
            qkv, a, b, z, self.kernel_params, *norm, *states, batch.slots, keep, backend=self.backend
        )
        return out[:, 0], GatedDeltaState(recurrent_state, conv_state)

    @property
    def kernel_params(self) -> gated_delta.Layer:
        """Parameters that the kernels read: convolution, decay and time-step bias."""
        return gated_delta.Layer(self.conv[...], self.A_log[...], self.dt_bias[...])


class GatedRMSNorm(nnx.Module):
    """Per-head norm `x / rms(x) * w * silu(z)`."""

    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "... V"], z: Float[Array, "... V"]) -> Float[Array, "... V"]:
        return gated_delta.gated_norm(x, z, self.weight[...], self.eps)
