"""Attention within packed views of any length, or within small windows, with a choice of backends.

Glossary: P patches in the row, I views, L the longest view, N heads, H head width.
"""

from jaxtyping import Array, Float, Int32

from kernels_pallas.backends import HOPPER, REFERENCE, TPU, Implementation, dispatch
from kernels_pallas.packed_attention import gpu, reference, tpu


def packed_attention(
    q: Float[Array, "P N H"],
    k: Float[Array, "P N H"],
    v: Float[Array, "P N H"],
    starts: Int32[Array, " I"],
    lengths: Int32[Array, " I"],
    *,
    longest: int,
    backend: str | None = None,
) -> Float[Array, "P N H"]:
    """Applies softmax attention within each view, scaled by H^-1/2. Differentiable in q, k and v.

    Args:
      q, k, v: the rows of all views one after another; there may be gaps.
      starts: each view's first row, ascending.
      lengths: each view's number of rows, at most `longest`; 0 for an absent view, whose start is P.
      longest: the static bound L; the reference takes I x N x L x L float32.
      backend: "reference", "hopper", "tpu", or None for the fastest that serves these arguments here.

    Returns:
      The attention's result, in q's dtype; zeros for rows of no view.

    Raises:
      ValueError, NotImplementedError: the backend does not serve these arguments; the message names one that
        does.
    """
    _check(q, k, v)
    implementations = {
        REFERENCE: Implementation(reference.packed_attention),
        HOPPER: Implementation(gpu.packed_attention, gpu.unsupported_reason(q)),
        TPU: Implementation(tpu.packed_attention, tpu.unsupported_reason(q)),
    }
    return dispatch(backend, implementations)(q, k, v, starts, lengths, longest)


def window_attention(
    q: Float[Array, "P N H"], k: Float[Array, "P N H"], v: Float[Array, "P N H"], *, window: int, backend: str | None = None
) -> Float[Array, "P N H"]:
    """Applies `packed_attention` with each `window` rows as a view. Differentiable.

    Raises:
      ValueError, NotImplementedError: as in `packed_attention`; or P is not a multiple of `window`.
    """
    if len(q) % window:
        raise ValueError(f"q has {len(q)} rows, expected a multiple of the window, {window}")
    _check(q, k, v)
    implementations = {
        REFERENCE: Implementation(reference.window_attention),
        HOPPER: Implementation(gpu.window_attention, gpu.unsupported_reason(q)),
        TPU: Implementation(tpu.window_attention, tpu.unsupported_reason(q)),
    }
    return dispatch(backend, implementations)(q, k, v, window)


def _check(q: Array, k: Array, v: Array) -> None:
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}, expected one dtype")
