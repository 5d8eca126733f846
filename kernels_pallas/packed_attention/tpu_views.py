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


class Blocks(NamedTuple):
    """The cut. The scalars of all blocks, and of one more a core, are known before the kernel starts.

    Attributes:
      begin: the first row that a block needs, rounded down to a tile.
      visits: windows from there on.
      spans: of each tile of rows the least and the greatest beginning, then the least and the greatest end of its rows' views.
      lower, upper: beginning and end of each row's view; NOWHERE and 0 for a row of no view.
    """

    begin: Int32[Array, " B2"]
    visits: Int32[Array, " B2"]
    spans: Int32[Array, "4 tiles"]
    lower: Float32[Array, "B t tile"]
    upper: Float32[Array, "B t tile"]


def bounds(starts: Int32[Array, " I"], lengths: Int32[Array, " I"], P: int) -> tuple[Int32[Array, " P"], Int32[Array, " P"]]:
    """Beginning and end of each row's view; NOWHERE and 0 for a row of no view."""
    row, ends = jnp.arange(P, dtype=jnp.int32)[:, None], starts + lengths
    inside_PI = (row >= starts[None]) & (row < ends[None])
    lower = jnp.min(jnp.where(inside_PI, starts[None], NOWHERE), axis=1, initial=NOWHERE)
    return lower, jnp.max(jnp.where(inside_PI, ends[None], 0), axis=1, initial=0)


def cut(lower: Int32[Array, " P"], upper: Int32[Array, " P"], rows: int, tile: int, window: int, spare: int) -> Blocks:
    """Blocks of `rows` rows, in tiles of `tile`, that visit windows of `window`; scalars of `spare` blocks of nothing behind."""
    padding = (0, -len(lower) % rows)
    lower, upper = (
        jnp.pad(x, padding, constant_values=c).reshape(-1, rows // tile, tile) for x, c in ((lower, NOWHERE), (upper, 0))
    )
    spans = jnp.stack([lower.min(2), lower.max(2), upper.min(2), upper.max(2)]).reshape(4, -1)
    begin = lower.min((1, 2)) // ALIGNED * ALIGNED
    visits = jnp.maximum(-(-(upper.max((1, 2)) - begin) // window), 0)
    begin, visits = (jnp.pad(x, (0, spare)) for x in (begin, visits))
    return Blocks(begin, visits, spans, lower.astype(jnp.float32), upper.astype(jnp.float32))


def window_row(begin, visit, window: int, P: int):
    """The first row of a visit's window, which must not reach past the last row: then it holds rows of the one before too."""
    return pl.multiple_of(jnp.minimum(begin + visit * window, P - window), ALIGNED)


def column(row):
    """[1, n] to [n, 1]."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def strangers(lower, upper, other, first):
    """-inf where row `other` is not in the view from `lower` to `upper`, or lies before `first`; else 0. Float32, broadcast."""
    known = (other >= jnp.maximum(lower, first)) & (other < upper)
    return jnp.where(known, 0.0, -jnp.inf)


def numbers(shape, axis, first) -> jax.Array:
    """Row numbers along an axis, from `first` on, float32."""
    return (first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)).astype(jnp.float32)
