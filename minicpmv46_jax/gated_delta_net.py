"""Gated delta net: the linear attention of 18 of the 24 layers (arXiv:2412.06464; transformers: Qwen3_5GatedDeltaNet).

Quirks: q, k and v pass one causal depthwise convolution and SiLU; q and k are L2-normalised per head, q scaled by K^-1/2; gates,
memory and their arithmetic are float32 always; the output norm multiplies by `w` (not `1 + w`) and then by silu(z).
Glossary: B batch, T tokens, D width, N heads, K key width, V value width, C channels of q, k and v together.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas import gated_delta
from minicpmv46_jax.config import TextConfig
from minicpmv46_jax.layers import Linear, l2_normalise, last, normal_init, rms_normalise
from minicpmv46_jax.state import DeltaState

L2_EPS = 1e-6  # fixed in the reference, not a field of the checkpoint


class GatedDeltaNet(nnx.Module):
    """Token mixer with a memory of fixed size: chunked over a prompt, one step a token in decoding."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.config = config
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
        qkv, conv_tail = gated_delta.causal_conv(self.in_proj_qkv(x), self.conv[...], state.conv_tail, num_valid)
        q, k, v = self.heads(qkv)
        g, beta = self.gates(x, num_valid)
        rule = gated_delta.recurrent if T == 1 else gated_delta.chunked
        out, memory = rule(q, k, v, g, beta, state.memory)
        z = self.in_proj_z(x).reshape(B, T, *out.shape[2:])
        out = self.norm(out.astype(x.dtype), z)
        return self.out_proj(out.reshape(B, T, -1)), DeltaState(memory, conv_tail)

    def heads(
        self, qkv: Float[Array, "B T C"]
    ) -> tuple[Float32[Array, "B T N K"], Float32[Array, "B T N K"], Float32[Array, "B T N V"]]:
        """Cuts the channels into normalised queries and keys, and values, one of each for every value head."""
        c = self.config
        q, k, v = jnp.split(qkv.astype(jnp.float32), [c.linear_key_dim, 2 * c.linear_key_dim], axis=-1)
        shape = (*qkv.shape[:2], -1)
        q = l2_normalise(q.reshape(*shape, c.linear_key_head_dim), L2_EPS) * c.linear_key_head_dim**-0.5
        k = l2_normalise(k.reshape(*shape, c.linear_key_head_dim), L2_EPS)
        shared = c.linear_num_value_heads // c.linear_num_key_heads
        return jnp.repeat(q, shared, axis=2), jnp.repeat(k, shared, axis=2), v.reshape(*shape, c.linear_value_head_dim)

    def gates(
        self, x: Float[Array, "B T D"], num_valid: Int32[Array, " B"]
    ) -> tuple[Float32[Array, "B T N"], Float32[Array, "B T N"]]:
        """Log decay and writing strength; both 0 for padding, which so leaves the memory as it was."""
        rate = jnp.exp(self.A_log[...].astype(jnp.float32))
        a = self.in_proj_a(x).astype(jnp.float32)
        step = jax.nn.softplus(a + last(self.dt_bias[...].astype(jnp.float32), a))
        beta = jax.nn.sigmoid(self.in_proj_b(x).astype(jnp.float32))
        real = (jnp.arange(x.shape[1])[None] < num_valid[:, None])[..., None]
        return jnp.where(real, -last(rate, step) * step, 0.0), jnp.where(real, beta, 0.0)


class GatedRMSNorm(nnx.Module):
    """`x / rms(x) * w * silu(z)`, per head."""

    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "... V"], z: Float[Array, "... V"]) -> Float[Array, "... V"]:
        y = rms_normalise(x.astype(jnp.float32), self.eps)
        y = y * last(self.weight[...].astype(jnp.float32), y)
        return (y * jax.nn.silu(z.astype(jnp.float32))).astype(x.dtype)
