"""Block windows and masks of the TPU kernels of packed attention.

The row of patches is cut into blocks of equal size, regardless of views. A block needs the rows from the
start of its first view to the end of its last one. These come in windows that begin on a tile of the memory.
A window's rows of other views get the score -inf, by a mask that serves all heads.
Glossary: P rows, I views, B blocks, L rows of a block, t tiles of a block, W rows of a window.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, Int32

ALIGNED = 16  # rows; tiles on chip have 16 rows in bfloat16 and 8 in float32
NOWHERE = 2**24  # the begin of the view of a row without one; float32 counts up to this number


class BlockWindows(NamedTuple):
    """The windows that each block visits, and the views of its rows.

    The scalars are prefetched; they include some spare blocks without windows at the end.

    Attributes:
      begin: the first row that a block needs.
      size: rows of each of its windows but the last.
      visits: the number of its windows.
      view_begins, view_ends: for each tile of rows, the begin of its first view and the end of its last view.
      lower, upper: begin and end of each row's view; NOWHERE and 0 for a row of no view.
    """

    begin: Int32[Array, " B2"]
    size: Int32[Array, " B2"]
    visits: Int32[Array, " B2"]
    view_begins: Int32[Array, " tiles"]
    view_ends: Int32[Array, " tiles"]
    lower: Float32[Array, "B t tile"]
    upper: Float32[Array, "B t tile"]


def bounds(starts: Int32[Array, " I"], lengths: Int32[Array, " I"], P: int) -> tuple[Int32[Array, " P"], Int32[Array, " P"]]:
    """Returns begin and end of each row's view; NOWHERE and 0 for a row of no view."""
    row, ends = jnp.arange(P, dtype=jnp.int32)[:, None], starts + lengths
    inside_PI = (row >= starts[None]) & (row < ends[None])
    lower = jnp.min(jnp.where(inside_PI, starts[None], NOWHERE), axis=1, initial=NOWHERE)
    return lower, jnp.max(jnp.where(inside_PI, ends[None], 0), axis=1, initial=0)


def cut_blocks(
    lower: Int32[Array, " P"], upper: Int32[Array, " P"], rows: int, tile: int, window: int, spare: int
) -> BlockWindows:
    """Cuts the row into blocks of `rows` rows, in tiles of `tile`, that visit windows of `window` rows.

    `spare` blocks without windows follow. A block over two views that each fit a window visits one after the
    other, so that no row of the second view is in both windows.
    """
    padding = (0, -len(lower) % rows)
    # A window begins on a tile, up to 15 rows before its first row.
    reach = window - ALIGNED + 1 if window < len(lower) else window
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
    """The rows of one visit.

    Attributes:
      first, end: the rows that the visit covers.
      row: the first row in the window's buffer, on a memory tile; the window ends within P.
    """

    first: jax.Array
    end: jax.Array
    row: jax.Array


def visit_window(begin, size, visits, block, visit, W: int, P: int) -> VisitWindow:
    """Returns the window of a block's visit."""
    first = begin[block] + visit * size[block]
    end = jnp.where(visit + 1 < visits[block], first + size[block], NOWHERE)
    return VisitWindow(first, end, pl.multiple_of(jnp.minimum(first // ALIGNED * ALIGNED, P - W), ALIGNED))


def column(row):
    """Transposes [1, n] to [n, 1]."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def outside_mask(lower, upper, visited: VisitWindow, shape, axis):
    """Returns a float32 mask: -inf for a window's rows outside of the view from `lower` to `upper`, else 0.

    The window's rows are counted along `axis`.
    """
    row = (visited.row + jax.lax.broadcasted_iota(jnp.int32, shape, axis)).astype(jnp.float32)
    inside = row >= jnp.maximum(lower, visited.first.astype(jnp.float32))
    inside &= row < jnp.minimum(upper, visited.end.astype(jnp.float32))
    return jnp.where(inside, 0.0, -jnp.inf)
