"""Packed attention in readable jnp: gather the views, attend densely, scatter the results back.

Glossary as in the api.
"""

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Int32


def packed_attention(
    q: Float[Array, "P N H"],
    k: Float[Array, "P N H"],
    v: Float[Array, "P N H"],
    starts: Int32[Array, " I"],
    lengths: Int32[Array, " I"],
    longest: int,
) -> Float[Array, "P N H"]:
    """Computes `api.packed_attention`."""
    P, _, H = q.shape
    offsets = jnp.arange(longest)
    rows_IL = jnp.minimum(starts[:, None] + offsets[None], P - 1)
    q, k, v = (x[rows_IL] for x in (q, k, v))  # [I, L, N, H]
    precision = Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("iqnh,iknh->inqk", q, k, precision=precision, preferred_element_type=jnp.float32) * H**-0.5
    # A finite floor, not -inf: an absent view has no keys, and the softmax of a row of -inf is NaN.
    scores = jnp.where(offsets[None, None, None] < lengths[:, None, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out_ILNH = jnp.einsum("inqk,iknh->iqnh", weights, v, precision=precision)
    view_P = jnp.searchsorted(starts, jnp.arange(P), side="right", method="compare_all") - 1
    offset_P = jnp.arange(P) - starts[view_P]
    real_P = (view_P >= 0) & (offset_P < lengths[view_P])
    return jnp.where(real_P[:, None, None], out_ILNH[view_P, jnp.minimum(offset_P, longest - 1)], jnp.zeros((), q.dtype))


def window_attention(
    q: Float[Array, "P N H"], k: Float[Array, "P N H"], v: Float[Array, "P N H"], window: int
) -> Float[Array, "P N H"]:
    """Computes `api.window_attention`."""
    shape = q.shape
    q, k, v = (x.reshape(-1, window, *shape[1:]) for x in (q, k, v))
    precision = Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("wqnh,wknh->wnqk", q, k, precision=precision, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * shape[-1] ** -0.5, axis=-1).astype(q.dtype)
    return jnp.einsum("wnqk,wknh->wqnh", weights, v, precision=precision).reshape(shape)
