"""The small pieces every part of the model is made of.

Quirks: weights lie `[out, in]`, as the checkpoint has them (at batch 1 a decode step on an H200 took 1.02 ms so, 1.51 ms with
`[in, out]`). Norms compute in float32 and return their input's dtype. The text's RMSNorm multiplies by `1 + w`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import Precision
from jaxtyping import Array, Float

Taps = dict[str, Array]  # named intermediate results, filled while a forward is traced

normal_init = nnx.initializers.normal(0.02)


def matmul_precision(dtype: jnp.dtype) -> Precision | None:
    """float32 products are exact ones, also where a chip would rather round them to TF32 or bfloat16."""
    return Precision.HIGHEST if dtype == jnp.float32 else None


def tap(taps: Taps | None, name: str, x: Array) -> None:
    """Keeps `x` under `name` where a caller asked for the intermediate results."""
    if taps is not None:
        taps[name] = x


def last(w: Float[Array, " D"], x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """A vector of weights shaped to act along the last axis of `x`; ranks are never promoted in silence here."""
    return w.reshape((1,) * (x.ndim - 1) + w.shape)


class Linear(nnx.Module):
    """`y = x W^T + b`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.weight = nnx.Param(normal_init(rngs.params(), (outputs, inputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        y = jnp.einsum("...i,oi->...o", x, self.weight[...], precision=matmul_precision(x.dtype))
        return y if self.bias is None else y + last(self.bias[...], y)


class Embedding(nnx.Module):
    """A table of vectors, looked up by row."""

    def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(normal_init(rngs.params(), (rows, width)))

    def __call__(self, ids: Array) -> Float[Array, "... D"]:
        return self.weight[...][ids]


class RMSNorm(nnx.Module):
    """Root-mean-square norm, zero-centred: `x / rms(x) * (1 + w)` (arXiv:1910.07467; Qwen3_5RMSNorm)."""

    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = rms_normalise(x.astype(jnp.float32), self.eps)
        return (y * last(1.0 + self.weight[...].astype(jnp.float32), y)).astype(x.dtype)


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
        weight, bias = (last(p[...].astype(jnp.float32), y) for p in (self.weight, self.bias))
        return (y * weight + bias).astype(x.dtype)


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, hidden, rngs=rngs)
        self.up_proj = Linear(width, hidden, rngs=rngs)
        self.down_proj = Linear(hidden, width, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def rms_normalise(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """`x` over the root of its mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
