"""The processor's results, inputs of the model: token ids and views. numpy only."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class View:
    """One image slice in a prompt: the source view or a slice of an image or of a video frame.

    Pixels stay bytes, a quarter of the size of float32, until `pixel_values` is read.

    Attributes:
        pixels: uint8 [h*w, 3*patch*patch]. A patch is flattened in (channel, y, x) order; patches are in
            row-major order.
        grid: (h, w) in patches.
        table: float32 [3, 256], read-only and shared: the normalised value of each byte, per channel.
        start: index in `Inputs.token_ids` of the view's first placeholder.
        num_tokens: number of placeholders, h*w // 16 or h*w // 4.
        downsample_mode: "16x" or "4x".
    """

    pixels: np.ndarray
    grid: tuple[int, int]
    table: np.ndarray
    start: int
    num_tokens: int
    downsample_mode: str

    @property
    def pixel_values(self) -> np.ndarray:
        """Normalised pixels, float32 [h*w, 3*patch*patch]; bit for bit the reference's values."""
        values = np.empty(self.pixels.shape, np.float32)
        channels = zip(self.table, np.split(self.pixels, 3, axis=1), np.split(values, 3, axis=1), strict=True)
        for table, pixels, out in channels:
            out[:] = table[pixels]
        return values


@dataclass(frozen=True, eq=False)
class Inputs:
    """One prompt's inputs of the model.

    Attributes:
        token_ids: int32 [T]; each placeholder is repeated once per feature of its view.
        views: every view, in prompt order.
        image_grids: per image, the (rows, columns) of its slices; (0, 0) without slices.
        video_grids: per video, the slice grid of each of its frames and composites.
    """

    token_ids: np.ndarray
    views: tuple[View, ...]
    image_grids: tuple[tuple[int, int], ...] = ()
    video_grids: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def pixel_values(self) -> np.ndarray:
        """Patches of all views in prompt order, float32 [N, 3*patch*patch]. Needs at least one view."""
        return np.concatenate([view.pixel_values for view in self.views])

    @property
    def target_sizes(self) -> np.ndarray:
        """Each view's (h, w) in patches, int32 [views, 2]."""
        return np.array([view.grid for view in self.views], np.int32).reshape(-1, 2)
