"""Parts that the Hopper kernels share: layouts, matrix products, barriers, the softmax and scalar functions.

Kernels are written for Mosaic GPU's Lane semantics, in which a kernel names its layouts. A "thread" is a
warpgroup of 128 CUDA threads. `[rows, columns]` matrices of float32 have the layout of wgmma's accumulators:
each CUDA thread holds pairs of neighbouring columns of two rows in eight. ROW and COL are the matching
layouts of vectors along rows and columns.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from kernels_pallas.backends import device_kind

MATRIX = plgpu.Layout.WGMMA
ROW, COL = MATRIX.reduce(1), MATRIX.reduce(0)
TRANSPOSE = (1, 0)  # the permutation of a reference's transposed view
WARPGROUP_ROWS = 64  # rows of a warpgroup's matrix product
NEG_INF = -1e30  # below every score, and finite, so that differences are not NaN


# Streaming multiprocessors by the start of the device kind, longer names first.
SM_COUNTS = {"NVIDIA H100 PCIe": 114, "NVIDIA H800 PCIe": 114, "NVIDIA H200": 132, "NVIDIA H20": 78}


def num_sms() -> int:
    """Returns the number of streaming multiprocessors of the device being compiled for.

    The mesh in use decides, else the default device. The device kind decides if jax reports no count.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described:
        count = described.num_cores
    else:
        device = jax.devices()[0]
        count = getattr(device, "core_count", None) if device.platform == "gpu" else None
    return count or next((n for kind, n in SM_COUNTS.items() if device_kind().startswith(kind)), 132)


def params(*, approximate: bool, **more: int) -> plgpu.CompilerParams:
    """Returns compiler options; `approximate` allows the chip's fast exponentials (2 ulp)."""
    return plgpu.CompilerParams(approx_math=approximate, lowering_semantics=plgpu.LoweringSemantics.Lane, **more)


def tiles(*shape: int, dtype: DTypeLike = jnp.bfloat16, swizzle: int | None = None) -> object:
    """Returns shared memory in swizzled tiles, `swizzle` bytes wide.

    TMA writes and wgmma reads such tiles without bank conflicts.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = swizzle or min(shape[-1] * size, 128)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load(ref: object, layout: object = ROW) -> object:
    """Loads device or shared memory into registers."""
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref: object, value: object) -> None:
    """Stores registers to memory.

    Stores of partial sectors or with bank conflicts are allowed; jax 0.12 requires this to be explicit.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def along_rows(vector: object, columns: int) -> object:
    """Repeats a ROW vector for every column."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0])


def along_columns(vector: object, rows: int) -> object:
    """Repeats a COL vector for every row."""
    return lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1])


def iota(shape: tuple[int, int], axis: int) -> object:
    """Returns a matrix of row (axis 0) or column (axis 1) numbers."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def product(a: object, b: object) -> object:
    """Computes `a @ b` in float32, with a in registers or shared memory and b in shared memory."""

    def multiply(accumulator: object) -> object:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def accumulate(total: object, a: object, b: object) -> object:
    """Computes `total + a @ b`."""
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(total))


def barrier_sync(barrier: object) -> None:
    """Arrives at a barrier and waits until all of its warpgroups have arrived."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def clustered(parts: int) -> dict[str, object]:
    """Returns kernel options for clusters of `parts` blocks along the axis "part"; none for one part."""
    return {"cluster": (parts,), "cluster_names": ("part",)} if parts > 1 else {}


def barrier_of(parts: int, groups: int) -> object:
    """Returns a barrier of all warpgroups of a cluster, or of a block if the cluster has one block."""
    if parts > 1:
        return plgpu.ClusterBarrier(collective_axes=("part",), num_arrivals=groups)
    return plgpu.Barrier(num_arrivals=groups)


def cluster_refs(ref: object, parts: int) -> list[object]:
    """Returns the reference's counterparts in the shared memory of all blocks of the cluster."""
    return [plgpu.cluster_ref(ref, {"part": jnp.int32(part)}) for part in range(parts)] if parts > 1 else [ref]


def cluster_sync(barrier: object) -> None:
    """Synchronises all blocks of a cluster.

    Stores of any thread before it are visible to all threads after it.
    """
    arrive_cluster(barrier)
    plgpu.barrier_wait(barrier)
    fence_cluster()


def arrive_cluster(barrier: object) -> None:
    """Arrives at a cluster's barrier after the warpgroup's stores.

    Threads that wait at the barrier need a fence before they read those stores. One CUDA thread arrives for
    the warpgroup, a different one at each block's barrier, so the warpgroup's threads are synchronised first.
    """
    plgpu.commit_smem()
    fence_cluster()
    plgpu.barrier_arrive(barrier)


def fence_cluster() -> None:
    """Orders a thread's memory accesses for all blocks of its cluster.

    Barriers alone do not order them.
    """
    from jax.experimental.mosaic.gpu.utils import inline_ptx  # not in jax 0.10

    @plgpu.inline_mgpu()
    def order(_) -> None:
        inline_ptx("fence.acq_rel.cluster;", has_side_effects=True)

    order()


def empty_softmax(width: int) -> tuple[object, object, object]:
    """Returns an online softmax (arXiv:2205.14135) before its first scores.

    Returns:
      The weighted sum of values, the sum of weights, and the largest score.
    """
    total = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, width), jnp.float32), MATRIX)
    weight = plgpu.layout_cast(jnp.zeros(WARPGROUP_ROWS, jnp.float32), ROW)
    return total, weight, plgpu.layout_cast(jnp.full(WARPGROUP_ROWS, NEG_INF, jnp.float32), ROW)


def online_softmax(scores: object, weight: object, largest: object, scale: float) -> tuple[object, object, object, object]:
    """Adds scores to an online softmax.

    Returns:
      The weights `2^(scale score - largest)` of the new scores, the factor by which earlier sums shrink, the
        new sum of weights, and the new largest score.
    """
    peak = jnp.maximum(largest, scores.max(axis=1) * scale)
    decay = jnp.exp2(largest - peak)
    weights = jnp.exp2(scores * scale - along_rows(peak, scores.shape[1]))
    return weights, decay, weight * decay + weights.sum(axis=1), peak


def finish_softmax(total: object, weight: object, largest: object) -> tuple[object, object]:
    """Returns the weighted mean of the values, and the base-2 logarithm of the sum of weights.

    A row without scores keeps its zeros.
    """
    weight = jnp.where(weight > 0, weight, 1.0)
    return total * along_rows(1 / weight, total.shape[1]), largest + jnp.log2(weight)


def sigmoid(x: object) -> object:
    """Computes `1 / (1 + exp(-x))`.

    It is the square of an inverse root, for which the chip has an instruction; a division takes ten.
    """
    root = lax.rsqrt(1 + jnp.exp(-x))
    return root * root


def silu(x: object) -> object:
    """Computes `x sigmoid(x)`."""
    return x * sigmoid(x)


def softplus(x: object) -> object:
    """Computes `log(1 + exp(x))` with a relative error of 1e-7, also for small results.

    Mosaic has no log1p, so a series replaces it where `exp(-|x|)` is small.
    """
    e = jnp.exp(-jnp.abs(x))
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e / 5))))  # below 0.03 the next term is under 1e-8
    return jnp.maximum(x, 0.0) + jnp.where(e < 0.03, series, jnp.log(1 + e))
