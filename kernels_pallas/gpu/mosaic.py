"""What the Hopper kernels share: layouts of registers and shared memory, matrix products, scalar functions.

Kernels are written for Mosaic GPU's Lane semantics, where a kernel names the layouts that it wants. A "thread" is a warpgroup of
128 CUDA threads. `[rows, columns]` matrices of float32 live in the layout of wgmma's accumulators: a thread of the group holds
pairs of neighbouring columns of two rows in eight; ROW and COL are vectors along rows or columns, as its threads need them.
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
ACROSS = (1, 0)  # the transposed view of a reference
WARPGROUP_ROWS = 64  # of a warpgroup's matrix product
NEG_INF = -1e30  # below every score


# Streaming multiprocessors by the start of the device kind, longer names first.
SM_COUNTS = {"NVIDIA H100 PCIe": 114, "NVIDIA H800 PCIe": 114, "NVIDIA H200": 132, "NVIDIA H20": 78}


def num_sms() -> int:
    """Returns the number of streaming multiprocessors of the device being compiled for.

    The mesh in use decides, else the default device. The device kind decides where jax reports no count.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described:
        count = described.num_cores
    else:
        device = jax.devices()[0]
        count = getattr(device, "core_count", None) if device.platform == "gpu" else None
    return count or next((n for kind, n in SM_COUNTS.items() if device_kind().startswith(kind)), 132)


def params(*, approximate: bool, **more: int) -> plgpu.CompilerParams:
    """Compiler options; `approximate` allows the chip's fast exponentials (2 ulp)."""
    return plgpu.CompilerParams(approx_math=approximate, lowering_semantics=plgpu.LoweringSemantics.Lane, **more)


def tiles(*shape: int, dtype: DTypeLike = jnp.bfloat16, swizzle: int | None = None) -> object:
    """Shared memory in the swizzled tiles that TMA writes and wgmma reads without bank conflicts; `swizzle` bytes wide."""
    size = jnp.dtype(dtype).itemsize
    swizzle = swizzle or min(shape[-1] * size, 128)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load(ref: object, layout: object = ROW) -> object:
    """Device or shared memory to registers."""
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref: object, value: object) -> None:
    """Registers to memory, also in less than whole sectors or with bank conflicts: jax 0.12 wants that said."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def along_rows(vector: object, columns: int) -> object:
    """A ROW vector, repeated for every column."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0])


def along_columns(vector: object, rows: int) -> object:
    """A COL vector, repeated for every row."""
    return lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1])


def iota(shape: tuple[int, int], axis: int) -> object:
    """Row or column numbers of a matrix."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def product(a: object, b: object) -> object:
    """`a @ b` in float32: a in registers or shared memory, b in shared memory."""

    def multiply(accumulator: object) -> object:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def accumulate(total: object, a: object, b: object) -> object:
    """`total + a @ b`."""
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(total))


def barrier_sync(barrier: object) -> None:
    """Waits until all of the barrier's warpgroups have come here as often."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def clustered(parts: int) -> dict[str, object]:
    """What makes a kernel's blocks work in clusters of so many, along the axis "part"; nothing for one."""
    return {"cluster": (parts,), "cluster_names": ("part",)} if parts > 1 else {}


def barrier_of(parts: int, groups: int) -> object:
    """A barrier of all warpgroups of a cluster, or of a block where a cluster is one."""
    if parts > 1:
        return plgpu.ClusterBarrier(collective_axes=("part",), num_arrivals=groups)
    return plgpu.Barrier(num_arrivals=groups)


def cluster_refs(ref: object, parts: int) -> list[object]:
    """The same shared memory of all blocks of the cluster."""
    return [plgpu.cluster_ref(ref, {"part": jnp.int32(part)}) for part in range(parts)] if parts > 1 else [ref]


def cluster_sync(barrier: object) -> None:
    """As `barrier_sync`, of all blocks of a cluster; what any thread has stored before it is there for all to read after it."""
    arrive_cluster(barrier)
    plgpu.barrier_wait(barrier)
    fence_cluster()


def arrive_cluster(barrier: object) -> None:
    """Arrives at a cluster's barrier with all that the warpgroup has stored; who has waited for it needs a fence to read that.

    One thread arrives for the others, at each block's barrier another one: they have to come together first.
    """
    plgpu.commit_smem()
    fence_cluster()
    plgpu.barrier_arrive(barrier)


def fence_cluster() -> None:
    """Orders a thread's accesses to memory before and after it, as all blocks of its cluster see them; barriers alone do not."""
    from jax.experimental.mosaic.gpu.utils import inline_ptx  # jax 0.10 has none

    @plgpu.inline_mgpu()
    def order(_) -> None:
        inline_ptx("fence.acq_rel.cluster;", has_side_effects=True)

    order()


def empty_softmax(width: int) -> tuple[object, object, object]:
    """A softmax kept up to date (arXiv:2205.14135) that has seen nothing: sum of values, sum of weights, largest score."""
    total = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, width), jnp.float32), MATRIX)
    weight = plgpu.layout_cast(jnp.zeros(WARPGROUP_ROWS, jnp.float32), ROW)
    return total, weight, plgpu.layout_cast(jnp.full(WARPGROUP_ROWS, NEG_INF, jnp.float32), ROW)


def online_softmax(scores: object, weight: object, largest: object, scale: float) -> tuple[object, object, object, object]:
    """With more scores: their weights `2^(scale score - largest)`, what the sums so far are worth now, and the new two."""
    peak = jnp.maximum(largest, scores.max(axis=1) * scale)
    faded = jnp.exp2(largest - peak)
    weights = jnp.exp2(scores * scale - along_rows(peak, scores.shape[1]))
    return weights, faded, weight * faded + weights.sum(axis=1), peak


def finish_softmax(total: object, weight: object, largest: object) -> tuple[object, object]:
    """The weighted mean, and the logarithm, base 2, of the sum of weights; a row without any keeps its zeros."""
    weight = jnp.where(weight > 0, weight, 1.0)
    return total * along_rows(1 / weight, total.shape[1]), largest + jnp.log2(weight)


def sigmoid(x: object) -> object:
    """`1 / (1 + exp(-x))`, as the square of the root that the chip has an instruction for; division takes it ten."""
    root = lax.rsqrt(1 + jnp.exp(-x))
    return root * root


def silu(x: object) -> object:
    """`x sigmoid(x)`."""
    return x * sigmoid(x)


def softplus(x: object) -> object:
    """`log(1 + exp(x))`, to 1e-7 of its value also where that is small: Mosaic has no log1p, so a series stands in for it."""
    e = jnp.exp(-jnp.abs(x))
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e / 5))))  # below 0.03 the next term is under 1e-8
    return jnp.maximum(x, 0.0) + jnp.where(e < 0.03, series, jnp.log(1 + e))
