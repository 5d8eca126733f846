"""One row times matrices on Hopper, in Mosaic GPU: a block for some outputs, all of whose weights are asked for at once.

The work is bound by reading the weights: a block asks for its whole tile before it looks at the row, so that all that the kernel
will read is under way together, and the norm is computed meanwhile, by each block for itself. The row, repeated 64 times, is the
left operand of wgmma in registers: 63 of 64 rows of the product are for nothing, and the matrix unit has time for them, where
multiplying and adding one by one would not keep up with the memory.
Glossary: K inputs, G matrices whose products meet in one output (2 of SwiGLU).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels_pallas.backends import mosaic_gap
from kernels_pallas.mosaic import ACROSS, COL, MATRIX, ROWS, accumulate, along_columns, load, params, silu, store, tiles

TILE, NARROW = 32, 8  # outputs of a block; fewer where there are few in all, or half of the chip would read nothing
WIDE = 2048  # outputs from which a tile is whole
CHUNK = 256  # inputs multiplied at once
UNIT = 64  # inputs are a multiple of so many: a row of swizzled shared memory
SHARED = 200 * 1024  # bytes of shared memory for a block's weights


def gap(x: jax.Array, weights: Sequence[jax.Array]) -> str | None:
    """What the kernel lacks for these arguments, or None."""
    T, K = x.shape
    if T != 1:
        return f"x has {T} rows, and it takes 1"
    if x.dtype != jnp.bfloat16 or any(weight.dtype != x.dtype for weight in weights):
        return f"x is {x.dtype} and the weights {', '.join(str(w.dtype) for w in weights)}, and it takes bfloat16 for all"
    if K % (2 * UNIT) or K * NARROW * 2 > SHARED:
        return f"x has {K} inputs, and it takes multiples of {2 * UNIT} up to {SHARED // (2 * NARROW)}"
    if any(weight.shape[0] % NARROW for weight in weights):
        return f"the weights have {', '.join(str(w.shape[0]) for w in weights)} outputs, and it takes multiples of {NARROW}"
    return mosaic_gap()


def normed_products(
    x: Float[Array, "1 D"], norm: Float[Array, " D"], eps: float, weights: Sequence[Float[Array, "_ D"]]
) -> list[Float[Array, "1 _"]]:
    """As `api.normed_products`."""
    return _run(x, [(weight,) for weight in weights], norm=norm, eps=eps)


def swiglu_product(
    x: Float[Array, "1 D"], norm: Float[Array, " D"], eps: float, gate: Float[Array, "F D"], up: Float[Array, "F D"]
) -> Float[Array, "1 F"]:
    """As `api.swiglu_product`."""
    return _run(x, [(gate, up)], norm=norm, eps=eps)[0]


def added_product(x: Float[Array, "1 K"], weight: Float[Array, "D K"], residual: Float[Array, "1 D"]) -> Float[Array, "1 D"]:
    """As `api.added_product`."""
    return _run(x, [(weight,)], residual=residual)[0]


def _run(x, groups, *, norm=None, eps=0.0, residual=None):
    """A product, or two that meet, for each group of matrices; blocks of one group after those of the other."""
    K, G = x.shape[1], len(groups[0])
    sizes = [_tile(group[0].shape[0], K * G) for group in groups]
    counts = [group[0].shape[0] // size for group, size in zip(groups, sizes, strict=True)]
    chunk, widest = next(c for c in (CHUNK, CHUNK // 2) if K % c == 0), max(sizes)
    optional = [array for array in (norm, residual) if array is not None]
    kernel = plgpu.kernel(
        functools.partial(_kernel, G=G, sizes=sizes, counts=counts, eps=eps, normed=norm is not None),
        out_type=[jax.ShapeDtypeStruct((1, group[0].shape[0]), x.dtype) for group in groups],
        grid=(sum(counts),),
        grid_names=("block",),
        scratch_types=[
            tiles(K // chunk * G, widest, chunk, swizzle=128),
            plgpu.SMEM((K,), x.dtype),
            plgpu.SMEM((G, ROWS, widest), jnp.float32),
            plgpu.Barrier(num_arrivals=G, num_barriers=K // chunk),
        ],
        compiler_params=params(approximate=False),
        kernel_name="row_products",
    )
    return kernel(x, *optional, *(weight for group in groups for weight in group))


def _tile(outputs: int, inputs: int) -> int:
    """Outputs of a block: a divisor of all of them, whose weights fit."""
    most = min(TILE if outputs >= WIDE else NARROW, SHARED // (2 * inputs))
    return max(size for size in range(NARROW, most + 1, NARROW) if outputs % size == 0)


def _kernel(x, *refs, G, sizes, counts, eps, normed):
    n = len(sizes)
    (extra, *weights), outs, (w_s, x_s, y_s, ready) = refs[: -n - 4], refs[-n - 4 : -4], refs[-4:]
    block, K, chunk = lax.axis_index("block"), x.shape[1], w_s.shape[2]
    C = K // chunk
    firsts = [sum(counts[:i]) for i in range(n)]

    def mine(i):
        """Whether the block is of group i, and which outputs are its."""
        at = block - firsts[i]
        return (at >= 0) & (at < counts[i]), pl.ds(at * sizes[i], sizes[i])

    for i in range(n):
        here, rows = mine(i)

        def fetch(c, _, i=i, rows=rows):
            columns = pl.ds(c * chunk, chunk)
            for g, source in enumerate(weights[i * G : (i + 1) * G]):
                plgpu.copy_gmem_to_smem(source.at[rows, columns], w_s.at[c * G + g, pl.ds(0, sizes[i])], ready.at[c])

        pl.when(here)(lambda fetch=fetch: lax.fori_loop(0, C, fetch, None))

    layout = plgpu.Layout.WG_STRIDED((K,), vec_size=next(v for v in (8, 4, 2, 1) if K % (128 * v) == 0))
    row = load(x.at[0], layout)
    x_s[...] = _norm(row, load(extra, layout), eps) if normed else row
    plgpu.commit_smem()

    totals = [plgpu.layout_cast(jnp.zeros((ROWS, max(sizes)), jnp.float32), MATRIX) for _ in range(G)]

    def multiply(c, totals):
        left = along_columns(load(x_s.at[pl.ds(c * chunk, chunk)], COL), ROWS)
        plgpu.barrier_wait(ready.at[c])
        return [accumulate(total, left, w_s.at[c * G + g].transpose(ACROSS)) for g, total in enumerate(totals)]

    for g, total in enumerate(lax.fori_loop(0, C, multiply, totals)):
        store(y_s.at[g], total)
    plgpu.commit_smem()

    for i in range(n):
        here, to = mine(i)

        @pl.when(here)
        def _finish(i=i, to=to):
            y, *second = (load(y_s.at[g, 0, pl.ds(0, sizes[i])], COL) for g in range(G))
            if second:
                y = silu(y.astype(x.dtype).astype(jnp.float32)) * second[0]
            if not normed:
                y = y + load(extra.at[0, to], COL).astype(jnp.float32)
            store(outs[i].at[0, to], y.astype(x.dtype))


def _norm(row, weight, eps):
    """`reference.rms_norm` of one row."""
    y = row.astype(jnp.float32)
    scale = lax.rsqrt(jnp.sum(y * y) * (1 / y.shape[0]) + eps)
    return (y * scale * (1 + weight.astype(jnp.float32))).astype(row.dtype)
