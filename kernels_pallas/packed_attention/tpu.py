"""Packed attention on TPU: the supported arguments, and their layout for the kernels.

Glossary as in the api; D = N x H.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas.packed_attention import tpu_backward, tpu_forward
from kernels_pallas.packed_attention.tpu_views import ALIGNED, NOWHERE, bounds
from kernels_pallas.tpu.stream import LANES

DTYPES = ("float32", "bfloat16")
WIDEST = 1152  # width of all heads together, for which the buffers on chip fit


def unsupported_reason(q: Float[Array, "P N H"]) -> str | None:
    """Returns why the kernels do not serve these arguments, or None if they do."""
    _, N, H = q.shape
    if H > LANES:
        return f"q's heads are {H} wide, and it takes up to {LANES}"
    if N * H > WIDEST:
        return f"q's {N} heads of {H} are {N * H} wide together, and it takes up to {WIDEST}"
    if 2 * N > LANES:
        return f"q has {N} heads, and it takes up to {LANES // 2}"
    if str(q.dtype) not in DTYPES:
        return f"q is {q.dtype}, and it takes {' or '.join(DTYPES)}"
    return None


def packed_attention(
    q: Float[Array, "P N H"],
    k: Float[Array, "P N H"],
    v: Float[Array, "P N H"],
    starts: Int32[Array, " I"],
    lengths: Int32[Array, " I"],
    longest: int,
) -> Float[Array, "P N H"]:
    """Computes `api.packed_attention`."""
    return _over_views(q, k, v, *bounds(starts, lengths, len(q)), longest)


def window_attention(
    q: Float[Array, "P N H"], k: Float[Array, "P N H"], v: Float[Array, "P N H"], window: int
) -> Float[Array, "P N H"]:
    """Computes `api.window_attention`."""
    lower = jnp.arange(len(q), dtype=jnp.int32) // window * window
    return _over_views(q, k, v, lower, lower + window, window)


def _over_views(q, k, v, lower, upper, longest):
    """Attends each row to the rows of its view, by the view's bounds."""
    P, N, _ = q.shape
    rows, padding = (x.reshape(P, -1) for x in (q, k, v)), -P % ALIGNED
    lower, upper = (jnp.pad(x, (0, padding), constant_values=c) for x, c in ((lower, NOWHERE), (upper, 0)))
    rows = (_cleared(jnp.pad(x, ((0, padding), (0, 0))), lower, upper) for x in rows)
    return _attention(N, longest, *rows, lower, upper)[:P].reshape(q.shape)


def _cleared(x: Float[Array, "P D"], lower: Int32[Array, " P"], upper: Int32[Array, " P"]) -> Float[Array, "P D"]:
    """Zeroes rows of no view.

    They may hold anything, and a product of zero and NaN is NaN. XLA fuses this with the computation of x.
    """
    return jnp.where((lower < upper)[:, None], x, jnp.zeros((), x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    N: int,
    longest: int,
    q: Float[Array, "P D"],
    k: Float[Array, "P D"],
    v: Float[Array, "P D"],
    lower: Int32[Array, " P"],
    upper: Int32[Array, " P"],
) -> Float[Array, "P D"]:
    sizes = tpu_forward.block_sizes(N, len(q), longest, q.dtype)
    (out,) = tpu_forward.forward(q, k, v, lower, upper, sizes)
    return out


def _forward(N, longest, q, k, v, lower, upper):
    sizes = tpu_forward.block_sizes(N, len(q), longest, q.dtype)
    out, sums = tpu_forward.forward(q, k, v, lower, upper, sizes, sums=True)
    return out, (q, k, v, lower, upper, out, sums)


def _backward(N, longest, residuals, d_out):
    q, k, v, lower, upper, out, sums = residuals
    P, d_out = len(q), _cleared(d_out, lower, upper)
    products = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).reshape(P, N, -1).sum(-1)
    sums = sums + jnp.pad(products, ((0, 0), (N, LANES - 2 * N)))
    arguments = (q, k, v, d_out, sums, lower, upper, tpu_backward.block_sizes(N, P, longest, q.dtype))
    return tpu_backward.queries(*arguments), *tpu_backward.keys_values(*arguments), None, None


_attention.defvjp(_forward, _backward)
