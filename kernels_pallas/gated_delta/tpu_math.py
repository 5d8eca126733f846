"""What the TPU kernels compute inside: every function is traced into a kernel and keeps to what Mosaic lowers."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.lax import Precision

from kernels_pallas.gated_delta.packing import CHUNK
from kernels_pallas.gated_delta.reference import L2_EPS

LANES = 128  # of a vector register; the only head width that these kernels take


def compiler_params(dtype):
    """Of a grid of (groups of heads, chunks). With float32 blocks v5p's default limit of 16 MiB on chip is too little."""
    limit = 48 * 2**20 if dtype == jnp.float32 else None
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit)


def dot(equation, x, y, dtype):
    """A product of operands cast to `dtype`, accumulated in float32; float32 operands in full precision (six passes)."""
    precision = Precision.HIGHEST if dtype == jnp.float32 else Precision.DEFAULT
    return jnp.einsum(equation, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def convolved(window_ref, conv_ref, channel, heads, first):
    """Convolution and SiLU of one chunk: [H, L, lanes], from the scratch window and the filters' taps."""
    W = conv_ref.shape[0]

    def head(j):
        taps = conv_ref[:, j * LANES : (j + 1) * LANES]
        x = sum(window_ref[channel + j, pl.ds(first - (W - 1) + i, CHUNK)] * taps[i : i + 1] for i in range(W))
        return x * jax.lax.logistic(x)

    return jnp.stack([head(j) for j in range(heads)])


def normalised(x):
    """`x / sqrt(sum x^2 + eps)` over the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2_EPS)


def softplus(x):
    """`log(1 + exp(x))`."""
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def gates(x, rate, bias, real, first_head, all_heads):
    """Cumulated log decay and writing strength of a chunk's tokens, [L, lanes] each, the step's heads in the first lanes."""
    g = jnp.where(real, -rate * softplus(x + bias), 0.0)
    beta = jnp.where(real, jax.lax.logistic(x), 0.0)
    return pltpu.roll(cumulated(g), LANES - first_head, 1), pltpu.roll(beta, LANES - all_heads - first_head, 1)


def lower_triangle(below):
    """Where i >= j + below, [L, L]."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in range(2))
    return i >= j + below


def cumulated(g):
    """Running sum over the chunk's tokens, as a product with a triangle of ones."""
    return dot("ij,jn->in", lower_triangle(0).astype(jnp.float32), g, jnp.float32)


def unit_inverse(lower, dtype):
    """The inverse of 1 + the strictly lower triangle of `lower` [H, L, L], by doubling of the blocks on the diagonal.

    `D - D O D` inverts blocks twice as large, O being what stands below the diagonal between two neighbours. Powers of the whole
    triangle would need no blocks, but they grow and cancel.
    """
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in range(2))

    def between_blocks(bit):
        return jnp.where((((i ^ j) >> bit == 1) & (i > j))[None], lower, 0.0)

    inverse = (i == j).astype(jnp.float32)[None] - between_blocks(0)
    for bit in range(1, CHUNK.bit_length() - 1):
        change = dot("nij,njk->nik", inverse, between_blocks(bit), dtype)
        inverse = inverse - dot("nij,njk->nik", change, inverse, dtype)
    return inverse
