"""`MediaJob`: one fetched image or video of a conversation, to open and slice, here or in another process."""

import dataclasses
from collections.abc import Callable
from typing import Any

from minicpmv46_jax.processing.images import SlicedImage, load_rgb, resize_pillow, slice_image
from minicpmv46_jax.processing.options import MediaConfig, MediaOptions
from minicpmv46_jax.processing.sources import describe
from minicpmv46_jax.processing.video import VideoLimits, load_video


@dataclasses.dataclass(frozen=True)
class MediaJob:
    """An image or video to open and slice, with its settings.

    Attributes:
        kind: "image" or "video".
        source: a source of `images.load_rgb` or `video.load_video`. The only strings are data URLs; the
            caller has fetched other strings.
        name: the source's name in error messages.
        config: the checkpoint's settings for this kind.
        options: the request's options.
        max_pixels: most pixels of an image, or of a video's frame.
        limits: limits of decoding a video.
    """

    kind: str
    source: Any
    name: str
    config: MediaConfig
    options: MediaOptions
    max_pixels: int
    limits: VideoLimits


MediaWorker = Callable[[MediaJob], tuple[SlicedImage, ...]]
"""Function that runs a job: one `SlicedImage` for an image, one per frame or composite for a video.

Raises ValueError for a source that is broken or too large.
"""


def process_media(job: MediaJob) -> tuple[SlicedImage, ...]:
    """Opens and slices the job's image or video in the calling thread. A `MediaWorker`."""
    source, config, options, name = job.source, job.config, job.options, job.name
    if job.kind == "video":
        return load_video(source, config, options, _refuse_fetch, job.max_pixels, job.limits, name)
    return (slice_image(load_rgb(source, _refuse_fetch, job.max_pixels, name), config, options, resize_pillow),)


def _refuse_fetch(url: str) -> bytes:
    """Raises AssertionError: URL rules apply before a job is made, so a job never fetches."""
    raise AssertionError(f"{describe(url)} should have been fetched")
