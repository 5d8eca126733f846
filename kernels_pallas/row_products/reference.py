"""The products for any number of rows, readable and differentiable: the kernel's truth, and the model's way where none is."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float


def normed_products(
    x: Float[Array, "T D"], norm: Float[Array, " D"], eps: float, weights: Sequence[Float[Array, "_ D"]]
) -> list[Float[Array, "T _"]]:
    """As `api.normed_products`."""
    normed = rms_norm(x, norm, eps)
    return [product(normed, weight) for weight in weights]


def swiglu_product(
    x: Float[Array, "T D"], norm: Float[Array, " D"], eps: float, gate: Float[Array, "F D"], up: Float[Array, "F D"]
) -> Float[Array, "T F"]:
    """As `api.swiglu_product`."""
    gated, raised = normed_products(x, norm, eps, (gate, up))
    return jax.nn.silu(gated) * raised


def added_product(x: Float[Array, "T K"], weight: Float[Array, "D K"], residual: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """As `api.added_product`."""
    return residual + product(x, weight)


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """Root-mean-square norm, zero-centred: `x / rms(x) * (1 + w)` (arXiv:1910.07467; Qwen3_5RMSNorm); float32 inside."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    scale = (1.0 + weight.astype(jnp.float32)).reshape((1,) * (y.ndim - 1) + weight.shape)
    return (y * scale).astype(x.dtype)


def product(x: Float[Array, "... i"], weight: Float[Array, "o i"]) -> Float[Array, "... o"]:
    """`x W^T`; in float32 exact, also where a chip would rather round to TF32 or bfloat16."""
    return jnp.einsum("...i,oi->...o", x, weight, precision=precise(x.dtype))


def precise(dtype: jnp.dtype) -> Precision | None:
    """How products of this dtype are made."""
    return Precision.HIGHEST if dtype == jnp.float32 else None
