"""Packed attention in readable jnp: lift the views out of the row, attend densely, lay them back.

Glossary: P patches in the row, I views, L the longest view, N heads, H head width.
"""

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Int


def packed_attention(
    q: Float[Array, "P N H"],
    k: Float[Array, "P N H"],
    v: Float[Array, "P N H"],
    starts: Int[Array, " I"],
    lengths: Int[Array, " I"],
    longest: int,
) -> Float[Array, "P N H"]:
    """Softmax attention of each view within itself, scaled by H^-1/2.

    Args:
      q, k, v: every view's rows one after another.
      starts: each view's first row, ascending.
      lengths: each view's rows, at most `longest`; 0 for a view that is not there (its start is then P).
      longest: the static bound L; it sets the memory used: I x N x L x L float32.

    Returns:
      In q's dtype. Rows that belong to no view hold finite numbers of no meaning.
    """
    P, _, H = q.shape
    offsets = jnp.arange(longest)
    rows_IL = jnp.minimum(starts[:, None] + offsets[None], P - 1)
    q, k, v = (x[rows_IL] for x in (q, k, v))  # [I, L, N, H]
    precision = Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("iqnh,iknh->inqk", q, k, precision=precision, preferred_element_type=jnp.float32) * H**-0.5
    # A finite floor, not -inf: an absent view has no key at all, and a row of -inf is NaN after the softmax.
    scores = jnp.where(offsets[None, None, None] < lengths[:, None, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out_ILNH = jnp.einsum("inqk,iknh->iqnh", weights, v, precision=precision)
    view_P = jnp.searchsorted(starts, jnp.arange(P), side="right", method="compare_all") - 1
    offset_P = jnp.minimum(jnp.arange(P) - starts[view_P], longest - 1)
    return out_ILNH[view_P, offset_P]
