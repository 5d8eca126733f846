"""One row times matrices on Hopper, in Mosaic GPU: a block for some outputs, all of whose weights are asked for at once.

The work is bound by reading the weights: a block asks for its whole tile before it looks at the row, so that all that the kernel
will read is under way together. Four warpgroups share the inputs and add up what they found. The row, repeated 64 times, is the
left operand of wgmma in registers: 63 of 64 rows of the product are for nothing, and the matrix unit has time for them, where
multiplying and adding one by one would not keep up with the memory. The norm's root is taken of the sums, after the products.
Glossary: K inputs, G matrices whose products meet in one output (2 of SwiGLU), C chunks of inputs.
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
from kernels_pallas.mosaic import (
    ACROSS,
    COL,
    MATRIX,
    PROCESSORS,
    ROW,
    ROWS,
    accumulate,
    along_columns,
    load,
    meet,
    params,
    silu,
    store,
    tiles,
)

NARROW, WIDEST = 8, 64  # outputs of a block
CHUNKS = 256, 128  # inputs multiplied at once: the first that all warpgroups have as many of
GROUPS = 4  # warpgroups of a block
SHARED = 224 * 1024  # bytes of shared memory of a block
MOST_INPUTS = 6656  # with which two matrices of the narrowest tile fit


def gap(x: jax.Array, weights: Sequence[jax.Array]) -> str | None:
    """What the kernel lacks for these arguments, or None."""
    T, K = x.shape
    if T != 1:
        return f"x has {T} rows, and it takes 1"
    if x.dtype != jnp.bfloat16 or any(weight.dtype != x.dtype for weight in weights):
        return f"x is {x.dtype} and the weights {', '.join(str(w.dtype) for w in weights)}, and it takes bfloat16 for all"
    if K % CHUNKS[-1] or K > MOST_INPUTS:
        return f"x has {K} inputs, and it takes multiples of {CHUNKS[-1]} up to {MOST_INPUTS}"
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
    sizes = _tiles([group[0].shape[0] for group in groups], K, G)
    counts = [group[0].shape[0] // size for group, size in zip(groups, sizes, strict=True)]
    chunk, widest = next((c for c in CHUNKS if K % (c * GROUPS) == 0), CHUNKS[-1]), max(sizes)
    optional = [array for array in (norm, residual) if array is not None]
    kernel = plgpu.kernel(
        functools.partial(_kernel, G=G, sizes=sizes, counts=counts, eps=eps, normed=norm is not None),
        out_type=[jax.ShapeDtypeStruct((1, group[0].shape[0]), x.dtype) for group in groups],
        grid=(sum(counts),),
        grid_names=("block",),
        num_threads=GROUPS,
        thread_name="group",
        scratch_types=[
            tiles(K // chunk * G, widest, chunk, swizzle=128),
            plgpu.SMEM((GROUPS, G, ROWS, widest), jnp.float32),
            plgpu.SMEM((GROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=G, num_barriers=K // chunk),
            plgpu.Barrier(num_arrivals=GROUPS),
        ],
        compiler_params=params(approximate=False),
        kernel_name="row_products",
    )
    return kernel(x, *optional, *(weight for group in groups for weight in group))


def _tiles(outputs: list[int], inputs: int, matrices: int) -> list[int]:
    """Outputs of a block for each of these groups: the fewest with which every block has a processor, as far as they fit."""
    for most in range(NARROW, WIDEST + 1, NARROW):
        sizes = [max(size for size in range(NARROW, most + 1, NARROW) if n % size == 0) for n in outputs]
        blocks = sum(n // size for n, size in zip(outputs, sizes, strict=True))
        if blocks <= PROCESSORS or _bytes(most + NARROW, inputs, matrices) > SHARED:
            break
    return sizes


def _bytes(size: int, inputs: int, matrices: int) -> int:
    """Shared memory of a block: weights, and what each warpgroup found."""
    return size * matrices * (2 * inputs + 4 * GROUPS * ROWS)


def _kernel(x, *refs, G, sizes, counts, eps, normed):
    n = len(sizes)
    (extra, *weights), outs, (w_s, y_s, square_s, ready, done) = refs[: -n - 5], refs[-n - 5 : -5], refs[-5:]
    block, group = lax.axis_index("block"), lax.axis_index("group")
    K, chunk, firsts = x.shape[1], w_s.shape[2], [sum(counts[:i]) for i in range(n)]
    mine = (K // chunk - group + GROUPS - 1) // GROUPS  # chunks of this warpgroup

    def outputs(i):
        """Whether the block is of matrix group i, and which outputs are its."""
        at = block - firsts[i]
        return (at >= 0) & (at < counts[i]), pl.ds(at * sizes[i], sizes[i])

    for i in range(n):
        here, rows = outputs(i)

        def fetch(j, _, i=i, rows=rows):
            c = group + j * GROUPS
            for g, source in enumerate(weights[i * G : (i + 1) * G]):
                to = w_s.at[c * G + g, pl.ds(0, sizes[i])]
                plgpu.copy_gmem_to_smem(source.at[rows, pl.ds(c * chunk, chunk)], to, ready.at[c])

        pl.when(here)(lambda fetch=fetch: lax.fori_loop(0, mine, fetch, None))

    def multiply(j, carry):
        squares, *totals = carry
        c = group + j * GROUPS
        columns = pl.ds(c * chunk, chunk)
        row = load(x.at[0, columns], COL)
        if normed:
            row = row.astype(jnp.float32)
            squares = squares + along_columns(row * row, ROWS).sum(axis=1)
            row = (row * (1 + load(extra.at[columns], COL).astype(jnp.float32))).astype(x.dtype)
        left = along_columns(row, ROWS)
        plgpu.barrier_wait(ready.at[c])
        return squares, *(accumulate(total, left, w_s.at[c * G + g].transpose(ACROSS)) for g, total in enumerate(totals))

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, max(sizes)), jnp.float32), MATRIX)
    none = plgpu.layout_cast(jnp.zeros(ROWS, jnp.float32), ROW)
    squares, *totals = lax.fori_loop(0, mine, multiply, (none, *[zeros] * G))
    for g, total in enumerate(totals):
        store(y_s.at[group, g], total)
    store(square_s.at[group], squares)
    plgpu.commit_smem()
    meet(done)

    def finish(i, to):
        y, *second = (sum(load(y_s.at[k, g, 0, pl.ds(0, sizes[i])], COL) for k in range(GROUPS)) for g in range(G))
        if normed:
            scale = lax.rsqrt(sum(square_s[k, 0] for k in range(GROUPS)) * (1 / K) + eps)
            y, *second = (part * scale for part in (y, *second))
        else:
            y = y + load(extra.at[0, to], COL).astype(jnp.float32)
        if second:
            y = silu(y.astype(x.dtype).astype(jnp.float32)) * second[0]
        store(outs[i].at[0, to], y.astype(x.dtype))

    for i in range(n):
        here, to = outputs(i)
        pl.when(here & (group == 0))(functools.partial(finish, i, to))
