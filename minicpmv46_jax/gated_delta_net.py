"""Gated delta net: the linear attention of 18 of the 24 layers (arXiv:2412.06464; transformers: Qwen3_5GatedDeltaNet).

Quirks: q, k and v pass one causal depthwise convolution and SiLU; q and k are L2-normalised per head, q scaled by K^-1/2; gates,
memory and their arithmetic are float32 always; the output norm multiplies by `w` (not `1 + w`) and then by silu(z). All of it
but the projections is `kernels_pallas.gated_delta`.
Glossary: B batch, T tokens, D width, N heads, K key width, V value width, C channels of q, k and v together.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from kernels_pallas import gated_delta
from minicpmv46_jax.config import TextConfig
from minicpmv46_jax.layers import Linear, normal_init
from minicpmv46_jax.state import DeltaState


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
        self, x: Float[Array, "B T D"], state: DeltaState, positions: Int32[Array, "B T"], num_valid: Int32[Array, " B"]
    ) -> tuple[Float[Array, "B T D"], DeltaState]:
        del positions  # order is all it knows of position
        B, T, _ = x.shape
        z = self.in_proj_z(x).reshape(B, T, self.config.linear_num_value_heads, -1)
        projected = self.in_proj_qkv(x), self.in_proj_a(x), self.in_proj_b(x)
        out, state = (self.step if T == 1 else self.read)(*projected, z, state, num_valid)
        return self.out_proj(out.reshape(B, T, -1)), state

    def read(
        self,
        qkv: Float[Array, "B T C"],
        a: Float[Array, "B T N"],
        b: Float[Array, "B T N"],
        z: Float[Array, "B T N V"],
        state: DeltaState,
        num_valid: Int32[Array, " B"],
    ) -> tuple[Float[Array, "B T N V"], DeltaState]:
        """Many tokens: the rows of the batch are sequences of one packed row."""
        B, T, _ = qkv.shape
        packed = (x.reshape(B * T, -1) for x in (qkv, a, b))
        starts = T * jnp.arange(B, dtype=jnp.int32)
        read = gated_delta.chunked(*packed, self.layer, state.memory, state.conv_tail, starts, num_valid, backend=self.backend)
        real = jnp.arange(T, dtype=jnp.int32)[None] < num_valid[:, None]  # the rest may hold anything, NaN too
        out = jnp.where(real[..., None, None], read.out.reshape(z.shape), jnp.zeros((), z.dtype))
        return self.norm(out, z), DeltaState(read.memory, read.tail)

    def step(
        self,
        qkv: Float[Array, "B T C"],
        a: Float[Array, "B T N"],
        b: Float[Array, "B T N"],
        z: Float[Array, "B T N V"],
        state: DeltaState,
        num_valid: Int32[Array, " B"],
    ) -> tuple[Float[Array, "B T N V"], DeltaState]:
        """One token of each row."""
        slots = jnp.arange(qkv.shape[0], dtype=jnp.int32)
        norm = self.norm.weight[...]
        out, memory, tail = gated_delta.recurrent(
            qkv, a, b, z, self.layer, norm, self.norm.eps, state.memory, state.conv_tail, slots, num_valid, backend=self.backend
        )
        return out, DeltaState(memory, tail)

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
