"""Packs views of images into passes of the vision tower (numpy only).

The tower merges 2x2 neighbours, once in the middle ("16x" only) and once at the end. The packer therefore
orders each view's patches by blocks: the patches of one token are adjacent, and inside them those of one
window in the middle. Attention ignores the order, because the position embedding is added by index. Both
merges become plain reshapes.

Sizes are rounded up to few buckets, so that few programs are compiled: patches to eighths of a power of two.
Glossary: P patches of a pass or a view, I views of a pass.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from minicpmv46_jax.trees import tree_dataclass

MERGES = {"16x": 2, "4x": 1}  # number of 2x2 merges from patches to tokens
MAX_VIEW_LENS = (64, 256, 576, 1088, 2304, 4928)  # buckets; 1088 holds 448 x 448 pixels in every aspect ratio
PACK_PATCHES = 16384  # patches of one pass; larger requests take several passes


@tree_dataclass
class PackedViews:
    """One pass of the vision tower.

    Patches stay bytes, which are a quarter of their float32 values to transfer; the tower computes
    `byte * scale + offset`.

    Attributes:
      patches: bytes of all views' patches, each view in block order.
      scale, offset: per patch and channel.
      position_ids: row of the learned position table of each patch.
      view_starts, view_lens: view i has the patches `view_starts[i] : view_starts[i] + view_lens[i]`. An
        unused entry starts at P.
      max_view_len: static upper bound of `view_lens`.
      downsample_mode: "16x" or "4x", static.
    """

    patches: UInt8[np.ndarray, "P patch_dim"]
    scale: Float32[np.ndarray, "P channels"]
    offset: Float32[np.ndarray, "P channels"]
    position_ids: Int32[np.ndarray, " P"]
    view_starts: Int32[np.ndarray, " I"]
    view_lens: Int32[np.ndarray, " I"]
    max_view_len: int = dataclasses.field(metadata={"static": True})
    downsample_mode: str = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True, eq=False)
class PackedView:
    """A view with its patches in block order; one `scale` and one `offset` per channel."""

    patches: UInt8[np.ndarray, "P patch_dim"]
    scale: Float32[np.ndarray, " channels"]
    offset: Float32[np.ndarray, " channels"]
    position_ids: Int32[np.ndarray, " P"]
    downsample_mode: str
    num_tokens: int


def block_order(height: int, width: int, merges: int) -> np.ndarray:
    """Returns row-major patch indices in block order, int64 [height * width].

    Raises:
      ValueError: a side is not a multiple of 2**merges.
    """
    side = 2**merges
    if height % side or width % side:
        raise ValueError(f"a patch grid of {height} x {width} cannot be merged {merges} times: sides must be multiples of {side}")
    # [rows, 2, 2, ..., columns, 2, 2, ...]
    # -> [rows, columns, (2, 2) of the last merge, ..., (2, 2) of the first]
    index = np.arange(height * width).reshape(height // side, *(2,) * merges, width // side, *(2,) * merges)
    pairs = [axis for merge in range(merges) for axis in (1 + merge, 2 + merges + merge)]
    return index.transpose(0, 1 + merges, *pairs).reshape(-1)


def nearest_positions(height: int, width: int, side: int) -> np.ndarray:
    """Returns the nearest row of the learned `side` x `side` position table per patch, int64 [height, width].

    The reference (transformers: get_vision_nearest_position_ids) sorts float32 coordinates i / height into
    float32 buckets. The arithmetic is the same here, so that a coordinate on a boundary is not moved.
    """
    step = 1 / side
    count = int(np.ceil((1.0 - step) / step))
    boundaries = (step + step * np.arange(count)).astype(np.float32)
    rows, columns = (
        np.searchsorted(boundaries, np.arange(n, dtype=np.float32) / np.float32(n), side="right") for n in (height, width)
    )
    return rows[:, None] * side + columns


def bucket_size(size: int) -> int:
    """Rounds up to a size of at most four significant bits: 64, 72, 80, ..., 128, 144, ...; at least 64."""
    step = max(1 << max(size.bit_length() - 4, 0), 8)
    return max(-(-size // step) * step, 64)


def pack(views: Sequence, positions_per_side: int, limit: int = PACK_PATCHES) -> Iterator[tuple[list[int], PackedViews]]:
    """Splits views into passes of at most `limit` patches, each of one downsample mode.

    Args:
      views: `processing.View`s.
      positions_per_side: side of the learned position table.
      limit: patches of a pass; a single larger view gets a pass of its own.

    Yields:
      (indices of the pass's views, the pass). The tower's tokens are those of the views, in order.
    """
    group: list[int] = []
    patches = 0
    for i, view in enumerate(views):
        size = view.grid[0] * view.grid[1]
        if group and (patches + size > limit or view.downsample_mode != views[group[0]].downsample_mode):
            yield group, _pack_group([views[j] for j in group], positions_per_side)
            group, patches = [], 0
        group.append(i)
        patches += size
    if group:
        yield group, _pack_group([views[j] for j in group], positions_per_side)


def pack_view(view, positions_per_side: int) -> PackedView:
    """Returns a view (`processing.View`) with its patches in block order."""
    order, positions = _block_layout(view.grid, MERGES[view.downsample_mode], positions_per_side)
    scale, offset = (view.table[:, 255] - view.table[:, 0]) / 255, view.table[:, 0]
    return PackedView(view.pixels[order], scale, offset, positions, view.downsample_mode, view.num_tokens)


def pack_views(views: Sequence[PackedView], patches: int, max_views: int, max_view_len: int) -> PackedViews:
    """Concatenates views of one downsample mode into one pass.

    The pass is padded to `patches` patches and `max_views` views.
    """
    lengths = np.array([len(view.patches) for view in views], np.int32)
    ends = np.cumsum(lengths)
    fits = len(views) <= max_views and ends[-1] <= patches and lengths.max() <= max_view_len
    assert fits, "the views are larger than the pass"
    row = np.zeros((patches, views[0].patches.shape[1]), np.uint8)
    scale, offset = np.zeros((2, patches, len(views[0].scale)), np.float32)
    positions = np.zeros(patches, np.int32)
    for view, end in zip(views, ends, strict=True):
        own = slice(end - len(view.patches), end)
        row[own], scale[own], offset[own], positions[own] = view.patches, view.scale, view.offset, view.position_ids
    view_starts, view_lens = np.full(max_views, patches, np.int32), np.zeros(max_views, np.int32)
    view_starts[: len(views)], view_lens[: len(views)] = ends - lengths, lengths
    return PackedViews(row, scale, offset, positions, view_starts, view_lens, max_view_len, views[0].downsample_mode)


def _pack_group(views: Sequence, positions_per_side: int) -> PackedViews:
    packed = [pack_view(view, positions_per_side) for view in views]
    lengths = [len(view.patches) for view in packed]
    max_view_len = next((bound for bound in MAX_VIEW_LENS if bound >= max(lengths)), bucket_size(max(lengths)))
    return pack_views(packed, bucket_size(sum(lengths)), _round_view_count(len(views)), max_view_len)


@functools.lru_cache(maxsize=256)  # few grids occur: the slices of 448 x 448 pixels in some aspect ratio
def _block_layout(grid: tuple[int, int], merges: int, positions_per_side: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the block order of a grid's patches, and their position ids in that order."""
    order = block_order(*grid, merges)
    return order, nearest_positions(*grid, positions_per_side).reshape(-1)[order].astype(np.int32)


def _round_view_count(count: int) -> int:
    """Rounds up to 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: a power of two or one and a half of one."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power
