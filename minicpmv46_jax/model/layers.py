"""Basic layers that every part of the model uses.

Quirks: weights are stored `[out, in]`, as in the checkpoint; decoding is a third slower with `[in, out]`.
Norms compute in float32 and return their input's dtype. The text's RMSNorm multiplies by `1 + w`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import Precision
from jaxtyping import Array, Float

Taps = dict[str, Array]  # named intermediate results, filled while a forward is traced

normal_init = nnx.initializers.normal(0.02)


def matmul_precision(dtype: jnp.dtype) -> Precision | None:
    """Returns HIGHEST for float32: accelerators round float32 products to TF32 or bfloat16 by default."""
    return Precision.HIGHEST if dtype == jnp.float32 else None


def tap(taps: Taps | None, name: str, x: Array) -> None:
    """Stores `x` in `taps` under `name`; does nothing where `taps` is None."""
    if taps is not None:
        taps[name] = x


def along_last_axis(w: Float[Array, " D"], x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Reshapes a vector of weights to broadcast along the last axis of `x`.

    Explicit, because the tests run with jax_numpy_rank_promotion="raise".
    """
    return w.reshape((1,) * (x.ndim - 1) + w.shape)


class Linear(nnx.Module):
    """Linear layer `y = x W^T + b`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.weight = nnx.Param(normal_init(rngs.params(), (outputs, inputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        y = jnp.einsum("...i,oi->...o", x, self.weight[...], precision=matmul_precision(x.dtype))
        return y if self.bias is None else y + along_last_axis(self.bias[...], y)


class Embedding(nnx.Module):
    """Table of vectors, looked up by row."""

    def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(normal_init(rngs.params(), (rows, width)))

    def __call__(self, ids: Array) -> Float[Array, "... D"]:
        return self.weight[...][ids]


class RMSNorm(nnx.Module):
    """Zero-centred root-mean-square norm: `x / rms(x) * (1 + w)` (arXiv:1910.07467; Qwen3_5RMSNorm)."""

    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = rms_normalise(x.astype(jnp.float32), self.eps)
        return (y * along_last_axis(1.0 + self.weight[...].astype(jnp.float32), y)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Mean and variance norm with weight and bias (arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = rms_normalise(y, self.eps)
        weight, bias = (along_last_axis(p[...].astype(jnp.float32), y) for p in (self.weight, self.bias))
        return (y * weight + bias).astype(x.dtype)


class SwiGLU(nnx.Module):
    """Gated MLP `down(silu(gate(x)) * up(x))` (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, hidden, rngs=rngs)
        self.up_proj = Linear(width, hidden, rngs=rngs)
        self.down_proj = Linear(hidden, width, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def rms_normalise(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """Divides `x` by the root of its mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
