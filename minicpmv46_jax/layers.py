"""The small pieces every part of the model is made of.

Quirks: weights lie `[out, in]`, as the checkpoint has them (at batch 1 a decode step on an H200 took 1.02 ms so, 1.51 ms with
`[in, out]`). Norms compute in float32 and return their input's dtype. The text's RMSNorm multiplies by `1 + w`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas import row_products
from kernels_pallas.row_products import precise, product, rms_norm

__all__ = ["Embedding", "LayerNorm", "Linear", "RMSNorm", "SwiGLU", "Taps", "last", "normal_init", "precise", "tap"]
Taps = dict[str, Array]  # named intermediate results, filled while a forward is traced

normal_init = nnx.initializers.normal(0.02)


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
        y = product(x, self.weight[...])
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
        return rms_norm(x, self.weight[...], self.eps)

    def products(self, x: Float[Array, "T D"], linears: Sequence[Linear], backend: str | None) -> list[Float[Array, "T _"]]:
        """What each of these products, which add no bias, makes of the normalised rows; `backend` as in `row_products`."""
        weights = [linear.weight[...] for linear in linears]
        return row_products.normed_products(x, self.weight[...], self.eps, weights, backend=backend)


class LayerNorm(nnx.Module):
    """Mean and variance norm with weight and bias (arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        weight, bias = (last(p[...].astype(jnp.float32), y) for p in (self.weight, self.bias))
        return (y * weight + bias).astype(x.dtype)


class SwiGLU(nnx.Module):
    """`x + down(silu(gate(norm(x))) * up(norm(x)))` (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, hidden, rngs=rngs)
        self.up_proj = Linear(width, hidden, rngs=rngs)
        self.down_proj = Linear(hidden, width, rngs=rngs)

    def __call__(self, x: Float[Array, "T D"], norm: RMSNorm, backend: str | None) -> Float[Array, "T D"]:
        gate, up, down = (linear.weight[...] for linear in (self.gate_proj, self.up_proj, self.down_proj))
        inner = row_products.swiglu_product(x, norm.weight[...], norm.eps, gate, up, backend=backend)
        return row_products.added_product(inner, down, x, backend=backend)
