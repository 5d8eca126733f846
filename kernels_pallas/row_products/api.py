"""The operations, a function each; `backend` says who runs them.

In decoding one conversation alone a product is a matrix read once for one row, in microseconds, and what stands between two of
them costs as much again as kernels of its own. Weights lie `[out, in]`.
Glossary: T rows, D model width, F inner width, K inputs.
"""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from kernels_pallas.backends import REFERENCE, choose
from kernels_pallas.row_products import gpu, reference


def normed_products(
    x: Float[Array, "T D"],
    norm: Float[Array, " D"],
    eps: float,
    weights: Sequence[Float[Array, "_ _"]],
    *,
    backend: str | None = None,
) -> list[Float[Array, "T _"]]:
    """The normalised rows times each of these matrices.

    Args:
      x: the residual stream.
      norm, eps: of the zero-centred RMSNorm, `x / rms(x) * (1 + norm)`.
      weights: matrices of any numbers of rows.
      backend: "reference", "gpu", or None for the fastest that serves these arguments here.

    Returns:
      A product for each matrix, in x's dtype.

    Raises:
      ValueError, NotImplementedError: the backend does not serve these arguments; the message names one that does.
    """
    return _runner(x, weights, backend).normed_products(x, norm, eps, weights)


def swiglu_product(
    x: Float[Array, "T D"],
    norm: Float[Array, " D"],
    eps: float,
    gate: Float[Array, "F _"],
    up: Float[Array, "_ _"],
    *,
    backend: str | None = None,
) -> Float[Array, "T F"]:
    """`silu(h gate^T) * (h up^T)` of the normalised rows h (arXiv:2002.05202). Arguments and errors as `normed_products`."""
    if gate.shape != up.shape:
        raise ValueError(f"gate is {gate.shape} and up {up.shape}, expected them alike")
    return _runner(x, (gate, up), backend).swiglu_product(x, norm, eps, gate, up)


def added_product(
    x: Float[Array, "T K"], weight: Float[Array, "D _"], residual: Float[Array, "T D"], *, backend: str | None = None
) -> Float[Array, "T D"]:
    """`residual + x weight^T`. Backends and errors as `normed_products`."""
    return _runner(x, (weight,), backend).added_product(x, weight, residual)


def _runner(x: jax.Array, weights: Sequence[jax.Array], backend: str | None):
    for weight in weights:
        if weight.shape[-1] != x.shape[-1]:
            raise ValueError(f"a weight is {weight.shape}, and the rows have {x.shape[-1]} inputs")
    return {REFERENCE: reference, "gpu": gpu}[choose(backend, {REFERENCE: None, "gpu": gpu.gap(x, weights)})]
