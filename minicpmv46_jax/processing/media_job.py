"""`MediaJob`: one fetched image or video of a conversation, to measure and to slice in any process."""

from dataclasses import dataclass
from typing import Any

from minicpmv46_jax.processing.images import (
    SlicedImage,
    SliceLayout,
    load_rgb,
    measure_image,
    resize_pillow,
    slice_image,
    slice_layout,
)
from minicpmv46_jax.processing.options import MediaConfig, MediaOptions
from minicpmv46_jax.processing.sources import describe
from minicpmv46_jax.processing.video import VideoLimits, VideoMetadata, load_video, measure_video


@dataclass(frozen=True)
class MediaMeasure:
    """The sizes of a job's result, before anything is decoded.

    Attributes:
        layouts: of the image, or of each frame and composite of a video.
        metadata: a video's; None for an image.
    """

    layouts: tuple[SliceLayout, ...]
    metadata: VideoMetadata | None = None


@dataclass(frozen=True)
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
        measure: the sizes, if they have been read.
    """

    kind: str
    source: Any
    name: str
    config: MediaConfig
    options: MediaOptions
    max_pixels: int
    limits: VideoLimits
    measure: MediaMeasure | None = None


def measure_media(job: MediaJob) -> MediaMeasure:
    """Reads the header of the job's file. Raises ValueError for a size that `process_media` refuses."""
    source, options, name, metadata = job.source, job.options, job.name, None
    if job.kind == "video":
        metadata, sizes = measure_video(source, options, _refuse_fetch, job.max_pixels, job.limits, name)
    else:
        sizes = [measure_image(source, _refuse_fetch, job.max_pixels, name)]
    return MediaMeasure(tuple(slice_layout(*size, job.config, options) for size in sizes), metadata)


def process_media(job: MediaJob) -> tuple[SlicedImage, ...]:
    """Opens and slices the job's image or video in the calling thread.

    Returns:
        One `SlicedImage` for an image, one per frame or composite for a video.
    Raises:
        ValueError: the source is broken or too large.
    """
    source, config, options, name = job.source, job.config, job.options, job.name
    if job.kind == "video":
        metadata = None if job.measure is None else job.measure.metadata
        return load_video(source, config, options, _refuse_fetch, job.max_pixels, job.limits, name, metadata)
    return (slice_image(load_rgb(source, _refuse_fetch, job.max_pixels, name), config, options, resize_pillow),)


def _refuse_fetch(url: str) -> bytes:
    """Raises AssertionError: URL rules apply before a job is made, so a job never fetches."""
    raise AssertionError(f"{describe(url)} should have been fetched")
