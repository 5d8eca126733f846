"""Which rows attend to which, as the TPU kernels want to know it.

The row of patches is cut into blocks of equal size, wherever views begin and end. A block needs the rows from where its first
view begins to where its last one ends; these come in windows that begin on a tile of the memory. What a window holds of other
views gets the score -inf, by a matrix that serves all heads.
Glossary: P rows, I views, B blocks, L rows of a block, t tiles of a block, W rows of a window.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, Int32

ALIGNED = 16  # rows: bfloat16 is tiled by 16 rows on chip, float32 by 8
NOWHERE = 2**24  # the beginning of the view of a row that has none; the largest row number that float32 counts to


class BlockWindows(NamedTuple):
    """The cut. The scalars of all blocks, and of some of nothing behind them, are known before the kernel starts.

    Attributes:
      begin: the first row that a block needs.
      size: rows of each of its windows but the last.
      visits: its windows.
      least, most: of each tile of rows where the first of its rows' views begins, and where the last ends.
      lower, upper: beginning and end of each row's view; NOWHERE and 0 for a row of no view.
    """

    begin: Int32[Array, " B2"]
    size: Int32[Array, " B2"]
    visits: Int32[Array, " B2"]
    least: Int32[Array, " tiles"]
    most: Int32[Array, " tiles"]
    lower: Float32[Array, "B t tile"]
    upper: Float32[Array, "B t tile"]


def bounds(starts: Int32[Array, " I"], lengths: Int32[Array, " I"], P: int) -> tuple[Int32[Array, " P"], Int32[Array, " P"]]:
    """Beginning and end of each row's view; NOWHERE and 0 for a row of no view."""
    row, ends = jnp.arange(P, dtype=jnp.int32)[:, None], starts + lengths
    inside_PI = (row >= starts[None]) & (row < ends[None])
    lower = jnp.min(jnp.where(inside_PI, starts[None], NOWHERE), axis=1, initial=NOWHERE)
    return lower, jnp.max(jnp.where(inside_PI, ends[None], 0), axis=1, initial=0)


def cut_blocks(
    lower: Int32[Array, " P"], upper: Int32[Array, " P"], rows: int, tile: int, window: int, spare: int
) -> BlockWindows:
    """Blocks of `rows` rows, in tiles of `tile`, that visit windows of `window`; scalars of `spare` blocks of nothing behind.

    A block over two views that each fit a window visits one and then the other, so that no row of the second is in both windows.
    """
    padding = (0, -len(lower) % rows)
    reach = window - ALIGNED + 1 if window < len(lower) else window  # a window begins on a tile, up to 15 rows early
    lower, upper = (
        jnp.pad(x, padding, constant_values=c).reshape(-1, rows // tile, tile) for x, c in ((lower, NOWHERE), (upper, 0))
    )
    begin, end = lower.min((1, 2)), upper.max((1, 2))
    last = jnp.where(lower < NOWHERE, lower, 0).max((1, 2))
    two = (end - begin > reach) & (last - begin <= reach) & (end - last <= reach)
    visits = jnp.where(two, 2, jnp.maximum(-(-(end - begin) // reach), 0))
    scalars = (jnp.pad(x, (0, spare)) for x in (begin, jnp.where(two, last - begin, reach), visits))
    tiles = lower.min(2).reshape(-1), upper.max(2).reshape(-1)
    return BlockWindows(*scalars, *tiles, lower.astype(jnp.float32), upper.astype(jnp.float32))


class VisitWindow(NamedTuple):
    """Of a visit: the rows that it is for, and the first row that its window holds, on a tile and so that it ends within P."""

    first: jax.Array
    end: jax.Array
    row: jax.Array


def visit_window(begin, size, visits, block, visit, W: int, P: int) -> VisitWindow:
    """That of a block's visit."""
    first = begin[block] + visit * size[block]
    end = jnp.where(visit + 1 < visits[block], first + size[block], NOWHERE)
    return VisitWindow(first, end, pl.multiple_of(jnp.minimum(first // ALIGNED * ALIGNED, P - W), ALIGNED))


def column(row):
    """[1, n] to [n, 1]."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def outside_mask(lower, upper, seen: VisitWindow, shape, axis):
    """-inf where a row of the window, counted along `axis`, is not in the view from `lower` to `upper`; else 0. Float32."""
    row = (seen.row + jax.lax.broadcasted_iota(jnp.int32, shape, axis)).astype(jnp.float32)
    known = (row >= jnp.maximum(lower, seen.first.astype(jnp.float32))) & (row < jnp.minimum(upper, seen.end.astype(jnp.float32)))
    return jnp.where(known, 0.0, -jnp.inf)
