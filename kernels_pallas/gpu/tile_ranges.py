"""Ranges of key tiles that the Hopper kernels' blocks of rows visit, and the layout of heads in memory.

The row of patches is split into blocks regardless of views. A block of rows visits all keys from the start of
its first row's view to the end of its last row's view, in tiles. Only tiles that are not visible to every row
of a warpgroup are masked. So nothing is padded or gathered, views may begin anywhere, and sixteen 2x2 windows
are one tile.

Heads of 72 values lie side by side, which is 4.5 tiles of 16 columns. A kernel fetches 80 columns: the head's
72 and 8 of a neighbouring head, before them for an odd head and behind them for an even one. The neighbour's
columns count as zeros in a product's left operand, and are dropped from results.
Glossary: P patches, R of them rounded up to whole blocks, I views, N heads, H head width.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from kernels_pallas.gpu.mosaic import WARPGROUP_ROWS, along_rows, iota

HEAD_PAD = 8  # columns of a neighbouring head that are fetched too


class TileRanges(NamedTuple):
    """The range of keys that each row sees, and the range of tiles that each block of rows visits.

    Attributes:
      first, end: the range of keys that a row sees; first >= end for a row of no view.
      begin: the first key of a block's first tile, a multiple of 8.
      count: the number of a block's tiles.
      groups: of each warpgroup of a block, as numbers of the block's tiles: begin and end of the tiles that
        it reads, and begin and end of those among them that need no mask.
    """

    first: Int32[Array, " R"]
    end: Int32[Array, " R"]
    begin: Int32[Array, " blocks"]
    count: Int32[Array, " blocks"]
    groups: Int32[Array, "blocks groups 4"]


def views(starts: Int32[Array, " I"], lengths: Int32[Array, " I"], rows: int) -> tuple[Int32[Array, " P"], Int32[Array, " P"]]:
    """Returns each row's view as its first row and end; `rows` and 0 for a row of no view."""
    row = jnp.arange(rows, dtype=jnp.int32)
    view = jnp.maximum(jnp.searchsorted(starts, row, side="right", method="compare_all").astype(jnp.int32) - 1, 0)
    first, end = starts[view], (starts + lengths)[view]
    real = (row >= first) & (row < end)
    return jnp.where(real, first, rows), jnp.where(real, end, 0)


def windows(size: int, rows: int) -> tuple[Int32[Array, " P"], Int32[Array, " P"]]:
    """Returns `views` for windows of `size` rows, one after the other."""
    first = jnp.arange(rows, dtype=jnp.int32) // size * size
    return first, first + size


def plan_tile_ranges(first: Int32[Array, " P"], end: Int32[Array, " P"], groups: int, tile: int) -> TileRanges:
    """Returns the tiles of size `tile` that blocks of `groups` x 64 rows visit."""
    rows = first.shape[0]
    blocks = -(-rows // (groups * WARPGROUP_ROWS))
    short = (0, blocks * groups * WARPGROUP_ROWS - rows)
    first, end = jnp.pad(first, short, constant_values=rows), jnp.pad(end, short)
    low, high = (x.reshape(blocks, groups, WARPGROUP_ROWS) for x in (first, end))
    begin = jnp.minimum(low.min(axis=(1, 2)), rows) // 8 * 8
    count = jnp.maximum(high.max(axis=(1, 2)) - begin + tile - 1, 0) // tile
    base = begin[:, None]
    edges = (low.min(axis=2), high.max(axis=2) + tile - 1, low.max(axis=2) + tile - 1, high.min(axis=2))
    of_groups = jnp.clip(jnp.stack([(edge - base) // tile for edge in edges], axis=-1), 0, count[:, None, None])
    of_groups = of_groups.at[..., 1].max(of_groups[..., 0])  # a warpgroup without rows reads nothing
    return TileRanges(first, end, begin, count, of_groups)


def columns(head: Array, H: int) -> object:
    """Returns the slice of a head's 80 columns."""
    return pl.ds(head * H - HEAD_PAD * lax.rem(head, 2), H + HEAD_PAD)


def zero_neighbour(ref: object, head: Array, H: int) -> None:
    """Zeroes the neighbouring head's columns of a tile in shared memory."""
    column = iota(ref.shape, 1) - HEAD_PAD * lax.rem(head, 2)
    ref[...] = jnp.where((column >= 0) & (column < H), ref[...], jnp.zeros((), ref.dtype))
    plgpu.commit_smem()


def store_head(result: Array, head: Array, H: int, staging: object, destination: object) -> None:
    """Copies a head's own columns of a result to device memory, without waiting.

    `staging` is a buffer in shared memory.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for side in range(2):

        @pl.when(lax.rem(head, 2) == side)
        def _(side=side):
            staging[...] = lax.slice(result, (0, HEAD_PAD * side), (WARPGROUP_ROWS, HEAD_PAD * side + H))

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, destination)


def visible(scores: Array, first: Array, end: Array, tile_start: Array) -> Array:
    """Returns a tile's scores, with -inf where a row does not see the column."""
    j, width = iota(scores.shape, 1) + tile_start, scores.shape[1]
    return jnp.where((j >= along_rows(first, width)) & (j < along_rows(end, width)), scores, -jnp.inf)
