"""Packs conversations into batches of one static shape (numpy only: it runs in the host's data workers).

A batch is R rows of L tokens with several conversations in a row, and the pictures of all rows in one vision
tower call. A step takes a tree of batches with two leading axes, `[accumulation, devices, ...]` (see
`stack`). Each device processes its own rows and pictures, one batch after the other. A conversation is never
cut: one that fits no batch is refused.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from minicpmv46_jax.config import VisionConfig
from minicpmv46_jax.model import packing
from minicpmv46_jax.model.packing import PackedViews
from minicpmv46_jax.processing import Inputs
from minicpmv46_jax.trees import tree_dataclass


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """A conversation to train on.

    Attributes:
      inputs: its tokens and pictures.
      loss_mask: for each token, True if it counts as a label, or its weight in the loss. The first token
        never counts.
      where: its place in the data, for error messages.
    """

    inputs: Inputs
    loss_mask: Bool[np.ndarray, " T"] | Float[np.ndarray, " T"]
    where: str = "a conversation"

    @property
    def num_tokens(self) -> int:
        return len(self.inputs.token_ids)

    @property
    def num_patches(self) -> int:
        return sum(h * w for h, w in (view.grid for view in self.inputs.views))


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Static sizes of a batch. `patches` and `views` are 0 in a batch without pictures.

    Attributes:
      rows: R.
      tokens: L, a multiple of 64.
      patches: patches of all pictures of a batch, a multiple of 16.
      views: number of pictures and image slices of a batch.
      longest: largest number of patches of one view.
      downsample_mode: the mode of every picture, "16x" or "4x".
    """

    rows: int
    tokens: int
    patches: int = 0
    views: int = 0
    longest: int = packing.MAX_VIEW_LENS[3]
    downsample_mode: str = "16x"

    def __post_init__(self):
        if self.rows < 1 or self.tokens < 64 or self.tokens % 64:
            raise ValueError(f"a batch has {self.rows} rows of {self.tokens} tokens: expected a row or more of a multiple of 64")
        if self.patches % 16 or (self.patches > 0) != (self.views > 0):
            raise ValueError(
                f"a batch has {self.patches} patches and {self.views} views: expected a multiple of 16 and some views, or none "
                f"of both"
            )
        if self.downsample_mode not in packing.MERGES:
            raise ValueError(f"downsample_mode is {self.downsample_mode!r}, expected one of {', '.join(packing.MERGES)}")

    def unsupported_reason(self, conversation: Conversation) -> str | None:
        """Returns why the conversation fits no batch of this shape, or None if it fits."""
        if conversation.num_tokens > self.tokens:
            return f"it has {conversation.num_tokens} tokens, a row holds {self.tokens}"
        views = conversation.inputs.views
        if len(views) > self.views or conversation.num_patches > self.patches:
            return (
                f"it has {len(views)} pictures and slices of {conversation.num_patches} patches, a batch holds {self.views} "
                f"of {self.patches}"
            )
        for view in views:
            if view.grid[0] * view.grid[1] > self.longest:
                return (
                    f"one of its pictures has {view.grid[0]} x {view.grid[1]} patches, a picture of a batch has at most "
                    f"{self.longest}"
                )
            if view.downsample_mode != self.downsample_mode:
                return f"one of its pictures is sliced for {view.downsample_mode!r}, the batch is for {self.downsample_mode!r}"
        return None


@tree_dataclass
class TrainBatch:
    """R rows of L tokens.

    Attributes:
      ids: token ids.
      labels: for each token, the token that follows it in its conversation.
      weights: each label's weight in the loss; 0 for tokens that do not count.
      segments: the conversation of its row that a token belongs to: 1, 2, ...; 0 for padding.
      feature_rows: for each token, the row of the picture features that replaces its embedding; -1 for text.
      views: the pictures of all rows, or None.
    """

    ids: Int32[np.ndarray, "R L"]
    labels: Int32[np.ndarray, "R L"]
    weights: Float32[np.ndarray, "R L"]
    segments: Int32[np.ndarray, "R L"]
    feature_rows: Int32[np.ndarray, "R L"]
    views: PackedViews | None


class BatchFiller:
    """A batch being filled. Each conversation goes into the first row with enough free tokens."""

    def __init__(self, shape: BatchShape):
        self.shape = shape
        self.rows: list[list[Conversation]] = [[] for _ in range(shape.rows)]
        self.free_tokens = [shape.tokens] * shape.rows
        self.free_patches, self.free_views = shape.patches, shape.views

    def add(self, conversation: Conversation) -> bool:
        """Adds the conversation and returns True, or returns False if this batch lacks the space.

        Raises:
          ValueError: no batch of this shape can hold the conversation.
        """
        if reason := self.shape.unsupported_reason(conversation):
            raise ValueError(f"{conversation.where}: {reason}")
        views = len(conversation.inputs.views)
        row = next((i for i, free in enumerate(self.free_tokens) if free >= conversation.num_tokens), None)
        if row is None or views > self.free_views or conversation.num_patches > self.free_patches:
            return False
        self.rows[row].append(conversation)
        self.free_tokens[row] -= conversation.num_tokens
        self.free_patches, self.free_views = self.free_patches - conversation.num_patches, self.free_views - views
        return True


def fill(conversations: Iterable[Conversation], shape: BatchShape) -> Iterator[list[list[Conversation]]]:
    """Yields the rows of one batch after another, in the order of the data. The last batch may be partly
    empty.

    Raises:
      ValueError: a conversation fits no batch; the message names it.
    """
    filler = BatchFiller(shape)
    for conversation in conversations:
        if not filler.add(conversation):
            yield filler.rows
            filler = BatchFiller(shape)
            filler.add(conversation)
    if any(filler.rows):
        yield filler.rows


def pack(rows: Sequence[Sequence[Conversation]], shape: BatchShape, vision: VisionConfig) -> TrainBatch:
    """Returns one batch that holds the conversations of each row.

    Args:
      rows: at most `shape.rows` rows, each of at most `shape.tokens` tokens in all.
      shape: the batch's sizes.
      vision: the vision tower's sizes.
    """
    size = shape.rows, shape.tokens
    ids, labels, segments = (np.zeros(size, np.int32) for _ in range(3))
    weights, feature_rows = np.zeros(size, np.float32), np.full(size, -1, np.int32)
    views, features = [], 0
    for r, row in enumerate(rows):
        start = 0
        for number, conversation in enumerate(row, start=1):
            inputs, end = conversation.inputs, start + conversation.num_tokens
            ids[r, start:end], segments[r, start:end] = inputs.token_ids, number
            labels[r, start : end - 1], weights[r, start : end - 1] = inputs.token_ids[1:], conversation.loss_mask[1:]
            for view in inputs.views:
                first = start + view.start
                feature_rows[r, first : first + view.num_tokens] = np.arange(features, features + view.num_tokens)
                features += view.num_tokens
                views.append(packing.pack_view(view, vision.positions_per_side))
            start = end
    return TrainBatch(ids, labels, weights, segments, feature_rows, _packed_views(views, shape, vision))


def _packed_views(views: Sequence[packing.PackedView], shape: BatchShape, vision: VisionConfig) -> PackedViews | None:
    if shape.views == 0:
        return None
    if views:
        return packing.pack_views(views, shape.patches, shape.views, shape.longest)
    row, channels = (
        np.zeros((shape.patches, vision.patch_dim), np.uint8),
        np.zeros((shape.patches, vision.num_channels), np.float32),
    )
    starts, lengths = np.full(shape.views, shape.patches, np.int32), np.zeros(shape.views, np.int32)
    positions = np.zeros(shape.patches, np.int32)
    return PackedViews(row, channels, channels, positions, starts, lengths, shape.longest, shape.downsample_mode)


def stack(batches: Sequence[TrainBatch], devices: int = 1) -> TrainBatch:
    """Stacks batches of one shape into a step's input, a tree of leaves `[accumulation, devices, ...]`.

    Args:
      batches: accumulation x devices batches.
      devices: number of devices.
    """
    assert len(batches) % devices == 0, f"{len(batches)} batches for {devices} devices"

    def join(*leaves: np.ndarray) -> np.ndarray:
        return np.stack(leaves).reshape(-1, devices, *leaves[0].shape)

    return jax.tree.map(join, *batches)
