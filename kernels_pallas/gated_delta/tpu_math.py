"""Functions that the TPU kernels compute inside.

Every function is traced into a kernel, so it uses only operations that Mosaic lowers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.lax import Precision
from jaxtyping import Array, Float32

from kernels_pallas.gated_delta.packing import CHUNK
from kernels_pallas.gated_delta.reference import L2_EPS

LANES = 128  # of a vector register; the only head width that these kernels support


class LayerRows(NamedTuple):
    """A layer's parameters in the layout of the TPU kernels.

    Attributes:
      conv: the filters by tap, oldest first.
      rate, bias: `exp(a_log)` and `dt_bias`, padded to 128 lanes.
    """

    conv: Float32[Array, "W C"]
    rate: Float32[Array, "1 lanes"]
    bias: Float32[Array, "1 lanes"]


def compiler_params(dtype):
    """Returns compiler options for a grid of (groups of heads, chunks).

    With float32 blocks, v5p's default limit of 16 MiB of on-chip memory is too small.
    """
    limit = 48 * 2**20 if dtype == jnp.float32 else None
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit)


def dot(equation, x, y, dtype):
    """Returns a product of operands cast to `dtype`, accumulated in float32.

    Float32 operands are multiplied in full precision (six passes).
    """
    precision = Precision.HIGHEST if dtype == jnp.float32 else Precision.DEFAULT
    return jnp.einsum(equation, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def convolved(window_ref, conv_ref, channel, heads, first):
    """Applies convolution and SiLU to one chunk.

    Returns [H, L, lanes], from the scratch window and the filters' taps.
    """
    W = conv_ref.shape[0]

    def head(j):
        taps = conv_ref[:, j * LANES : (j + 1) * LANES]
        x = sum(window_ref[channel + j, pl.ds(first - (W - 1) + i, CHUNK)] * taps[i : i + 1] for i in range(W))
        return x * jax.lax.logistic(x)

    return jnp.stack([head(j) for j in range(heads)])


def normalised(x):
    """Returns `x / sqrt(sum x^2 + eps)` over the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2_EPS)


def softplus(x):
    """Returns `log(1 + exp(x))`."""
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def gates(x, rate, bias, real, first_head, all_heads):
    """Returns the cumulative log decay and the writing strength of a chunk's tokens, [L, lanes] each.

    The step's heads are in the first lanes.
    """
    g = jnp.where(real, -rate * softplus(x + bias), 0.0)
    beta = jnp.where(real, jax.lax.logistic(x), 0.0)
    return pltpu.roll(cumulated(g), LANES - first_head, 1), pltpu.roll(beta, LANES - all_heads - first_head, 1)


def lower_triangle(below):
    """Returns the mask i >= j + below, [L, L]."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in range(2))
    return i >= j + below


def cumulated(g):
    """Returns the running sum over the chunk's tokens, as a product with a triangle of ones."""
    return dot("ij,jn->in", lower_triangle(0).astype(jnp.float32), g, jnp.float32)


def unit_inverse(lower, dtype):
    """Returns the inverse of 1 + the strictly lower triangle of `lower` [H, L, L].

    Diagonal blocks are doubled: `D - D O D` inverts blocks twice as large. O is the part below the diagonal
    between two neighbouring blocks. A sum over powers of the whole triangle would need no blocks, but its
    terms grow and cancel.
    """
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in range(2))

    def between_blocks(bit):
        return jnp.where((((i ^ j) >> bit == 1) & (i > j))[None], lower, 0.0)

    inverse = (i == j).astype(jnp.float32)[None] - between_blocks(0)
    for bit in range(1, CHUNK.bit_length() - 1):
        change = dot("nij,njk->nik", inverse, between_blocks(bit), dtype)
        inverse = inverse - dot("nij,njk->nik", change, inverse, dtype)
    return inverse
