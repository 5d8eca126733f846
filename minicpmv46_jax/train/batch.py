"""Conversations packed into batches of one static shape (numpy only: it runs on the host's workers).

A batch is R rows of L tokens, several conversations in a row, and one pass of pictures for all rows. A step takes a tree of
batches with two leading axes, `[accumulation, devices, ...]` (`stack`): each device reads its own rows and pictures, one batch
after the other. Conversations are never cut: what does not fit a row or the pass at all is refused.
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
    """A conversation to learn from.

    Attributes:
      inputs: its tokens and pictures, whole.
      loss_mask: of each token, whether the model is to say it, or how much that counts; the first is never.
      where: its place in the data, for messages.
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
    """The static sizes of a batch. Without pictures, `patches` and `views` are 0.

    Attributes:
      rows: R.
      tokens: L, a multiple of 64.
      patches: of all pictures of a batch, a multiple of 16.
      views: pictures and slices of a batch.
      longest: patches of a view, at most.
      downsample_mode: of all of them.
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
                f"a batch has {self.patches} patches and {self.views} views: expected a multiple of 16 and some, or none"
            )
        if self.downsample_mode not in packing.MERGES:
            raise ValueError(f"downsample_mode is {self.downsample_mode!r}, expected one of {', '.join(packing.MERGES)}")

    def unsupported_reason(self, conversation: Conversation) -> str | None:
        """Why the conversation fits no batch of this shape, or None."""
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
                return f"a picture of it has {view.grid[0]} x {view.grid[1]} patches, a batch's have at most {self.longest}"
            if view.downsample_mode != self.downsample_mode:
                return f"a picture of it is cut for {view.downsample_mode!r}, the batch for {self.downsample_mode!r}"
        return None


@tree_dataclass
class TrainBatch:
    """R rows of L tokens.

    Attributes:
      ids: the tokens.
      labels: the token that follows each in its conversation.
      weights: how much each label counts in the loss; 0 where nothing is to be learned.
      segments: which conversation of its row a token belongs to: 1, 2, ..., and 0 for padding.
      feature_rows: as in `model.TokenBlock`.
      views: the pictures of all rows, or None.
    """

    ids: Int32[np.ndarray, "R L"]
    labels: Int32[np.ndarray, "R L"]
    weights: Float32[np.ndarray, "R L"]
    segments: Int32[np.ndarray, "R L"]
    feature_rows: Int32[np.ndarray, "R L"]
    views: PackedViews | None


class BatchFiller:
    """A batch being filled: each conversation goes into the first row that has room."""

    def __init__(self, shape: BatchShape):
        self.shape = shape
        self.rows: list[list[Conversation]] = [[] for _ in range(shape.rows)]
        self.room = [shape.tokens] * shape.rows
        self.patches, self.views = shape.patches, shape.views

    def add(self, conversation: Conversation) -> bool:
        """Takes the conversation, or says that there is no room for it. Raises ValueError where no batch has room."""
        if unsupported_reason := self.shape.unsupported_reason(conversation):
            raise ValueError(f"{conversation.where}: {unsupported_reason}")
        views = len(conversation.inputs.views)
        row = next((i for i, room in enumerate(self.room) if room >= conversation.num_tokens), None)
        if row is None or views > self.views or conversation.num_patches > self.patches:
            return False
        self.rows[row].append(conversation)
        self.room[row] -= conversation.num_tokens
        self.patches, self.views = self.patches - conversation.num_patches, self.views - views
        return True


def fill(conversations: Iterable[Conversation], shape: BatchShape) -> Iterator[list[list[Conversation]]]:
    """The rows of one batch after another, in the order of the data; the last batch may be part empty.

    Raises ValueError naming a conversation that fits no batch.
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
    """One batch of the conversations that stand in each row.

    Args:
      rows: at most `shape.rows`, each of at most `shape.tokens` tokens in all.
      shape: the batch's sizes.
      vision: the tower's sizes.
    """
    size = shape.rows, shape.tokens
    ids, labels, segments = (np.zeros(size, np.int32) for _ in range(3))
    weights, feature_rows = np.zeros(size, np.float32), np.full(size, -1, np.int32)
    views, features = [], 0
    for r, row in enumerate(rows):
        at = 0
        for number, conversation in enumerate(row, start=1):
            inputs, end = conversation.inputs, at + conversation.num_tokens
            ids[r, at:end], segments[r, at:end] = inputs.token_ids, number
            labels[r, at : end - 1], weights[r, at : end - 1] = inputs.token_ids[1:], conversation.loss_mask[1:]
            for view in inputs.views:
                start = at + view.start
                feature_rows[r, start : start + view.num_tokens] = np.arange(features, features + view.num_tokens)
                features += view.num_tokens
                views.append(packing.pack_view(view, vision.positions_per_side))
            at = end
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
    """What a step takes: `[accumulation, devices, ...]`, out of accumulation x devices batches of one shape."""
    assert len(batches) % devices == 0, f"{len(batches)} batches for {devices} devices"

    def join(*leaves: np.ndarray) -> np.ndarray:
        return np.stack(leaves).reshape(-1, devices, *leaves[0].shape)

    return jax.tree.map(join, *batches)
