"""What the processor hands to the model: token ids and views. numpy only."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class View:
    """One picture the vision tower sees: a source view or one slice, of an image or of a video frame.

    Pixels stay bytes, a quarter of their float32 values, until `pixel_values` is asked for.

    Attributes:
        pixels: uint8 [h*w, 3*patch*patch]; a patch is flattened in (channel, y, x) order, patches go row by row.
        grid: (h, w) in patches.
        table: float32 [3, 256], read-only and shared: the normalised value of each byte, per channel.
        start: index in `Inputs.token_ids` of the first placeholder that its features replace.
        num_tokens: number of placeholders, h*w // 16 or // 4.
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
        """float32 [h*w, 3*patch*patch], normalised: bit for bit the reference's values."""
        values = np.empty(self.pixels.shape, np.float32)
        channels = zip(self.table, np.split(self.pixels, 3, axis=1), np.split(values, 3, axis=1), strict=True)
        for table, pixels, out in channels:
            out[:] = table[pixels]
        return values


@dataclass(frozen=True, eq=False)
class Inputs:
    """One prompt, ready for the model.

    Attributes:
        token_ids: int32 [T], each placeholder already repeated once for every feature it stands for.
        views: every view, in prompt order.
        image_grids: per image, the (rows, columns) of its slices; (0, 0) where it was not cut.
        video_grids: per video, the same for each of its frames and composites.
    """

    token_ids: np.ndarray
    views: tuple[View, ...]
    image_grids: tuple[tuple[int, int], ...] = ()
    video_grids: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def pixel_values(self) -> np.ndarray:
        """float32 [N, 3*patch*patch]: the patches of all views, one after the other. Needs at least one view."""
        return np.concatenate([view.pixel_values for view in self.views])

    @property
    def target_sizes(self) -> np.ndarray:
        """int32 [views, 2]: each view's (h, w) in patches."""
        return np.array([view.grid for view in self.views], np.int32).reshape(-1, 2)
