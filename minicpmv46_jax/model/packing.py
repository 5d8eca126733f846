"""Lays pictures in one row for the tower (numpy only).

The tower merges 2x2 neighbours, once in the middle ("16x" alone) and once at the end. The packer therefore orders each view's
patches by blocks: all patches that end in one token stand together, and inside them all that end in one mid-tower window.
Attention does not care about order (the position embedding is added by index), and both merges become plain reshapes.

Sizes are rounded up to few buckets, so that few programs are compiled: patches to eighths of a power of two.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from minicpmv46_jax.trees import tree_dataclass

MERGES = {"16x": 2, "4x": 1}  # 2x2 merges on the way from patches to tokens
MAX_VIEW_LENS = (64, 256, 576, 1088, 2304, 4928)  # bounds of the longest view; 1088 holds the 448 x 448 slices of every aspect
PACK_PATCHES = 16384  # one pass through the tower; larger requests take several


@tree_dataclass
class PackedViews:
    """One pass through the tower. P patches in the row, I views; `max_view_len` bounds a view and is static.

    Patches are the picture's bytes, a quarter of the traffic of their values; the tower computes `byte * scale + offset`.
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
    """A view in the order the tower takes its patches; `scale` and `offset` are one for each channel."""

    patches: UInt8[np.ndarray, "P patch_dim"]
    scale: Float32[np.ndarray, " channels"]
    offset: Float32[np.ndarray, " channels"]
    position_ids: Int32[np.ndarray, " P"]
    mode: str
    num_tokens: int


def block_order(height: int, width: int, merges: int) -> np.ndarray:
    """Row-major patch indices in the order the tower takes them, int64 [height * width].

    Raises ValueError where the grid cannot be merged: the sides must be multiples of 2**merges.
    """
    side = 2**merges
    if height % side or width % side:
        raise ValueError(f"a patch grid of {height} x {width} cannot be merged {merges} times: sides must be multiples of {side}")
    # [rows, 2, 2, ..., columns, 2, 2, ...] -> [rows, columns, (2, 2) of the last merge, ..., (2, 2) of the first]
    index = np.arange(height * width).reshape(height // side, *(2,) * merges, width // side, *(2,) * merges)
    pairs = [axis for merge in range(merges) for axis in (1 + merge, 2 + merges + merge)]
    return index.transpose(0, 1 + merges, *pairs).reshape(-1)


def nearest_positions(height: int, width: int, side: int) -> np.ndarray:
    """For every patch, the row of the learned `side` x `side` position table nearest to it, int64 [height, width].

    The reference puts float32 coordinates i / height into float32 buckets (transformers: get_vision_nearest_position_ids);
    the same arithmetic here, so that a coordinate on a boundary falls on the same side.
    """
    step = 1 / side
    count = int(np.ceil((1.0 - step) / step))
    boundaries = (step + step * np.arange(count)).astype(np.float32)
    rows, columns = (
        np.searchsorted(boundaries, np.arange(n, dtype=np.float32) / np.float32(n), side="right") for n in (height, width)
    )
    return rows[:, None] * side + columns


def bucket(size: int) -> int:
    """The next size with at most four significant bits: 64, 72, 80, ..., 128, 144, ...; at least 64."""
    step = max(1 << max(size.bit_length() - 4, 0), 8)
    return max(-(-size // step) * step, 64)


def pack(views: Sequence, positions_per_side: int, limit: int = PACK_PATCHES) -> Iterator[tuple[list[int], PackedViews]]:
    """Splits views into passes of at most `limit` patches, each of one downsample mode.

    Args:
      views: `processing.View`s.
      positions_per_side: side of the learned position table.
      limit: patches in a pass; a single larger view gets a pass of its own.

    Yields:
      The indices of the views in a pass, and the pass. The pass's tokens are those of its views, one after another.
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
    """A view (`processing.View`) as the tower takes it."""
    order, positions = _places(view.grid, MERGES[view.downsample_mode], positions_per_side)
    scale, offset = (view.table[:, 255] - view.table[:, 0]) / 255, view.table[:, 0]
    return PackedView(view.pixels[order], scale, offset, positions, view.downsample_mode, view.num_tokens)


def pack_views(views: Sequence[PackedView], patches: int, slots: int, longest: int) -> PackedViews:
    """Views of one mode as one pass, padded to so many patches and views."""
    lengths = np.array([len(view.patches) for view in views], np.int32)
    ends = np.cumsum(lengths)
    assert len(views) <= slots and ends[-1] <= patches and lengths.max() <= longest, "the views are larger than the pass"
    row = np.zeros((patches, views[0].patches.shape[1]), np.uint8)
    scale, offset = np.zeros((2, patches, len(views[0].scale)), np.float32)
    positions = np.zeros(patches, np.int32)
    for view, end in zip(views, ends, strict=True):
        own = slice(end - len(view.patches), end)
        row[own], scale[own], offset[own], positions[own] = view.patches, view.scale, view.offset, view.position_ids
    starts, padded_lengths = np.full(slots, patches, np.int32), np.zeros(slots, np.int32)
    starts[: len(views)], padded_lengths[: len(views)] = ends - lengths, lengths
    return PackedViews(row, scale, offset, positions, starts, padded_lengths, longest, views[0].mode)


def _pack_group(views: Sequence, positions_per_side: int) -> PackedViews:
    laid = [pack_view(view, positions_per_side) for view in views]
    lengths = [len(view.patches) for view in laid]
    longest = next((bound for bound in MAX_VIEW_LENS if bound >= max(lengths)), bucket(max(lengths)))
    return pack_views(laid, bucket(sum(lengths)), _view_slots(len(views)), longest)


@functools.lru_cache(maxsize=256)  # few shapes: a slice's sides are those of 448 x 448 in some aspect
def _places(grid: tuple[int, int], merges: int, positions_per_side: int) -> tuple[np.ndarray, np.ndarray]:
    """The tower's order of a grid's patches, and each one's position in that order."""
    order = block_order(*grid, merges)
    return order, nearest_positions(*grid, positions_per_side).reshape(-1)[order].astype(np.int32)


def _view_slots(count: int) -> int:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ...: the next power of two or one and a half of one."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power
