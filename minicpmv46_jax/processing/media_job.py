"""One image or video of a conversation, from what was fetched to its views. Can be sent to another process and done there."""

import dataclasses
from collections.abc import Callable
from typing import Any

from minicpmv46_jax.processing.images import SlicedImage, load_rgb, resize_pillow, slice_image
from minicpmv46_jax.processing.options import MediaConfig, MediaOptions
from minicpmv46_jax.processing.sources import describe
from minicpmv46_jax.processing.video import VideoLimits, load_video


@dataclasses.dataclass(frozen=True)
class MediaJob:
    """What is to be cut, and how.

    Attributes:
        kind: "image" or "video".
        source: as `images.load_rgb` or `video.load_video` take it; of strings data URLs alone, others have been fetched.
        name: what messages call the source.
        config: the checkpoint's settings of its kind.
        options: the request's.
        max_pixels: most pixels of an image, or of a video's frame.
        limits: what reading a video may cost.
    """

    kind: str
    source: Any
    name: str
    config: MediaConfig
    options: MediaOptions
    max_pixels: int
    limits: VideoLimits


MediaWorker = Callable[[MediaJob], tuple[SlicedImage, ...]]
"""One cut of an image, one of each frame or composite of a video. Raises ValueError for a source that is broken or too large."""


def process_media(job: MediaJob) -> tuple[SlicedImage, ...]:
    """In this thread."""
    source, config, options, name = job.source, job.config, job.options, job.name
    if job.kind == "video":
        return load_video(source, config, options, _fetched, job.max_pixels, job.limits, name)
    return (slice_image(load_rgb(source, _fetched, job.max_pixels, name), config, options, resize_pillow),)


def _fetched(url: str) -> bytes:
    """In place of a way to get at URLs: which may be opened has been decided before."""
    raise AssertionError(f"{describe(url)} should have been fetched")
