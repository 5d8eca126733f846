"""Video sources -> sampled frames and composites -> slices of patches.

Results equal transformers' MiniCPMV4_6VideoProcessor.

One main frame per second is sampled. With `stack_frames` = n > 1, the n - 1 frames between two main frames
are joined on one canvas, a composite, which follows its main frame. Frames and composites are then sliced
like images.

Quirks of the reference:
- A video longer than `max_num_frames` seconds is sampled evenly from ticks of 0.1 s; so are the frames
  between. But the composite of second i still follows the i-th main frame, which then shows another second.
- A frame that is sampled twice appears twice. (The reference's own PyAV reader drops the second.)
- A frame is resized by torch's uint8 kernel (resize.py), not by Pillow. The factor 255 is folded into mean
  and deviation, so values differ from an image's in the last bit.

Glossary:
  main frame: the frame sampled for a second.
  composite: several frames joined on one canvas.
  frame group: indices of the frames that make one image: a main frame alone, or all frames of a composite.
"""

import io
import math
import numbers
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

from minicpmv46_jax.processing.images import MAX_PIXELS, SlicedImage, check_size, load_rgb, slice_image
from minicpmv46_jax.processing.options import MediaConfig, MediaOptions
from minicpmv46_jax.processing.resize import resize_bicubic
from minicpmv46_jax.processing.sources import FetchMedia, describe, read

SEAM = 6  # black pixels between the frames of a composite
MIN_DECODED_PIXELS = 2**20
TICK = 0.1  # seconds between the moments from which a long video is sampled

# FFmpeg's names of containers that hold their frames themselves. Audio containers are among them, so that
# their error is "no video stream".
CONTAINERS = (
    "mov,mp4,matroska,webm,avi,gif,apng,flv,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,ogg,asf,wtv,nut,mxf,dv,"
    "aac,aiff,amr,flac,mp3,wav"
)

FrameGroup = tuple[int, ...]
"""Indices of the frames that make one image: a single frame, or the frames of a composite."""


@dataclass(frozen=True, eq=False)
class Video:
    """A video that is decoded already.

    Attributes:
        frames: uint8 [frames, height, width, 3], or a list of PIL images or uint8 arrays [height, width, 3].
        fps: frames per second, a number above 0. Sampling depends on it.
    """

    frames: Any
    fps: Any


@dataclass(frozen=True)
class VideoMetadata:
    """Number of frames, frame rate (frames per second) and frame size (0 if not known) of a video."""

    num_frames: int
    rate: float | int | Fraction
    height: int = 0
    width: int = 0

    @property
    def fps(self) -> float:
        return float(self.rate)

    @property
    def duration(self) -> float:
        """Seconds. A container's rate is a fraction, so the quotient is rounded once."""
        return float(self.num_frames / self.rate)


@dataclass(frozen=True)
class VideoLimits:
    """Limits of one video. A server sets them, because a small file can contain hours.

    Attributes:
        max_frames: most frames to decode, skipped frames included.
        max_seconds: longest decoding time, in seconds.
        max_images: most frames and composites of one video in a prompt.
    """

    max_frames: float = math.inf
    max_seconds: float = math.inf
    max_images: float = math.inf

    def frame_groups(self, metadata: "VideoMetadata", options: MediaOptions, name: str) -> list[FrameGroup]:
        """Returns the video's frame groups. Raises ValueError for a video that is too long.

        The main frames are counted by arithmetic first: a header may state any duration.
        """
        if metadata.num_frames > self.max_frames:
            raise ValueError(f"{name}: the video has {metadata.num_frames} frames, more than the {self.max_frames} allowed")
        self._check_images(min(math.ceil(metadata.duration), options.max_num_frames), name)
        groups = plan_frame_groups(metadata, options)
        self._check_images(len(groups), name)
        return groups

    def _check_images(self, number: int, name: str) -> None:
        if number > self.max_images:
            raise ValueError(
                f"{name}: {number} frames would be shown, more than the {self.max_images} allowed; lower max_num_frames"
            )

    def enforce(self, frames: Iterable[Any], name: str) -> Iterator[Any]:
        """Yields the frames. Raises ValueError at the frame or the second that is over a limit."""
        end = time.monotonic() + self.max_seconds
        for i, frame in enumerate(frames):
            if i >= self.max_frames:
                raise ValueError(f"{name}: the video has more than the {self.max_frames} frames allowed")
            if time.monotonic() > end:
                raise ValueError(f"{name}: decoding the video takes longer than the {self.max_seconds:g} seconds allowed")
            yield frame


NO_VIDEO_LIMITS = VideoLimits()


def sample_frames(metadata: VideoMetadata, max_num_frames: int, stack_frames: int) -> tuple[list[int], dict[int, list[int]]]:
    """Samples the indices of a video's main frames and of the frames between them.

    Returns:
        main: indices of the main frames, in order.
        between: second -> indices of the frames between, in order; empty without stacking.
    """
    last, fps, duration = metadata.num_frames - 1, metadata.fps, metadata.duration
    seconds = math.ceil(duration)
    if duration > max_num_frames:
        ticks = _spread_evenly(int(duration / TICK), max_num_frames)
        main = [min(int(round(i * TICK, 1) * fps), last) for i in ticks]
    else:
        main = [min(int(i * fps), last) for i in range(seconds)]
    between: dict[int, list[int]] = {}
    per_second = stack_frames - 1
    if per_second:
        in_last = sum(seconds - 1 + j / stack_frames < duration for j in range(1, stack_frames))
        for i in _spread_evenly((seconds - 1) * per_second + in_last, max_num_frames * per_second):
            second, j = divmod(i, per_second)
            moment = second + (j + 1) / stack_frames
            between.setdefault(second, []).append(min(int(moment * fps), last))
    return main, between


def _spread_evenly(number: int, most: int) -> list[int]:
    """Returns the indices 0..number-1, thinned evenly to at most `most` of them."""
    return list(range(number)) if number <= most else np.linspace(0, number - 1, most, dtype=int).tolist()


def plan_frame_groups(metadata: VideoMetadata, options: MediaOptions) -> list[FrameGroup]:
    """Returns a video's frame groups in prompt order: main frame i, then the composite of second i."""
    main, between = sample_frames(metadata, options.max_num_frames, options.stack_frames)
    groups: list[FrameGroup] = []
    for second, frame in enumerate(main):
        groups.append((frame,))
        if second in between:
            groups.append(tuple(between[second]))
    return groups


def join_frames(frames: list[np.ndarray]) -> np.ndarray:
    """Joins n frames, uint8 [height, width, 3], on one black canvas with 6-pixel seams.

    Four frames make a square. Two or three make the row or the column that is nearer to a square. More make a
    row.
    """
    height, width, _ = frames[0].shape
    rows, columns = _composite_layout(len(frames), height, width)
    canvas = np.zeros((rows * (height + SEAM) - SEAM, columns * (width + SEAM) - SEAM, 3), np.uint8)
    for i, frame in enumerate(frames):
        top, left = i // columns * (height + SEAM), i % columns * (width + SEAM)
        canvas[top : top + height, left : left + width] = frame
    return canvas


def _composite_layout(number: int, height: int, width: int) -> tuple[int, int]:
    """Returns the (rows, columns) of a composite."""
    if number == 4:
        return 2, 2
    if number not in (2, 3):
        return 1, number
    row = abs((number * (width + SEAM) - SEAM) / height - 1)
    column = abs(width / (number * (height + SEAM) - SEAM) - 1)
    if row == column:
        return (1, number) if number == 3 or width >= height else (number, 1)
    return (1, number) if row < column else (number, 1)


def slice_frame_groups(
    frames: Iterable[tuple[int, np.ndarray]], groups: list[FrameGroup], slice_frame: Callable[[np.ndarray], SlicedImage]
) -> list[SlicedImage]:
    """Slices each frame group as soon as its last frame arrives.

    A frame is dropped after its last group, so few frames are in memory at once.

    Args:
        frames: pairs of index and pixels, uint8 [height, width, 3], with rising indices.
        groups: the frame groups; a group may occur twice.
        slice_frame: slices a frame or a composite.
    Returns:
        The sliced image of each group, in order. A group that lacks a frame is left out.
    """
    ready: dict[int, list[FrameGroup]] = {}
    for group in set(groups):
        ready.setdefault(max(group), []).append(group)
    last_use = {frame: max(group) for group in sorted(set(groups), key=max) for frame in group}
    held: dict[int, np.ndarray] = {}
    done: dict[FrameGroup, SlicedImage] = {}
    for index, frame in frames:
        held[index] = frame
        for group in ready.get(index, []):
            done[group] = slice_frame(frame if len(group) == 1 else join_frames([held[i] for i in group]))
        held = {i: f for i, f in held.items() if last_use[i] > index}
    return [done[group] for group in groups if group in done]


def load_video(
    source: Any,
    config: MediaConfig,
    options: MediaOptions,
    fetch: FetchMedia,
    max_pixels: int = MAX_PIXELS,
    limits: VideoLimits = NO_VIDEO_LIMITS,
    name: str | None = None,
    metadata: VideoMetadata | None = None,
) -> tuple[SlicedImage, ...]:
    """Samples a video's frames and slices each frame and composite.

    Args:
        source: a path, URL or data URL (str), `pathlib.Path`, bytes, or a `Video` of decoded frames.
        config: the checkpoint's settings.
        options: the request's options.
        fetch: reads URLs and paths.
        max_pixels: frames and composites larger than this are refused.
        limits: limits of a file. They do not apply to a `Video`, which its caller has decoded.
        name: the source's name in error messages; by default derived from the source.
        metadata: a file's metadata if `measure_video` has read it.
    Returns:
        One sliced image per frame and composite, in prompt order.
    Raises:
        ValueError: the source is not a video, is broken, has no video stream or no frames, or is not
            available; its frames are too large or too many.
    """
    name = name or describe(source)

    def slice_frame(frame: np.ndarray) -> SlicedImage:
        check_size(frame.shape[0], frame.shape[1], max_pixels, name)  # composites too, which are larger than a frame
        return slice_image(frame, config, options, resize_bicubic)

    if isinstance(source, Video):
        return _slice_decoded(source, options, slice_frame, fetch, max_pixels)
    if not isinstance(source, (str, bytes, bytearray, Path)):
        raise ValueError(f"{name}: frames alone have no frame rate, pass Video(frames, fps); or a str, Path or bytes")
    data = read(source, fetch)
    try:
        return _slice_file(
            data, options, slice_frame, metadata or probe(data, max_pixels, name, limits), max_pixels, name, limits
        )
    except FFmpegError as error:
        raise _broken(error, name) from None


def measure_video(
    source: str | bytes | bytearray | Path,
    options: MediaOptions,
    fetch: FetchMedia,
    max_pixels: int,
    limits: VideoLimits,
    name: str,
) -> tuple[VideoMetadata, list[tuple[int, int]]]:
    """Returns a video file's metadata, and (height, width) of each frame and composite that would be shown.

    The container's header is read. Frames are decoded only to count them where it lacks their number.

    Args:
        source, options, fetch, max_pixels, limits, name: see `load_video`.
    Raises:
        ValueError: the source is not a video, or `load_video` would refuse its size or its length.
    """
    data = read(source, fetch)
    try:
        metadata = probe(data, max_pixels, name, limits)
    except FFmpegError as error:
        raise _broken(error, name) from None
    sizes = []
    for group in limits.frame_groups(metadata, options, name):
        rows, columns = _composite_layout(len(group), metadata.height, metadata.width) if len(group) > 1 else (1, 1)
        height, width = rows * (metadata.height + SEAM) - SEAM, columns * (metadata.width + SEAM) - SEAM
        check_size(height, width, max_pixels, name)
        sizes.append((height, width))
    return metadata, sizes


def _broken(error: FFmpegError, name: str) -> ValueError:
    return ValueError(f"{name}: not a video, or a broken one ({error.strerror})")


def _slice_decoded(
    video: Video, options: MediaOptions, slice_frame: Callable[[np.ndarray], SlicedImage], fetch: FetchMedia, max_pixels: int
) -> tuple[SlicedImage, ...]:
    name, fps = "Video", video.fps
    if not isinstance(video.frames, (np.ndarray, list, tuple)):
        raise ValueError(f"{name}: frames must be an array or a list, got {type(video.frames).__name__}")
    if isinstance(fps, bool) or not isinstance(fps, numbers.Real) or fps <= 0 or not fps < math.inf:
        raise ValueError(f"{name}: fps must be a number above 0, got {fps!r}")
    if isinstance(video.frames, np.ndarray) and (video.frames.ndim != 4 or video.frames.dtype != np.uint8):
        shape, dtype = video.frames.shape, video.frames.dtype
        raise ValueError(f"{name}: expected uint8 [frames, height, width, 3], got {dtype} {shape}")
    if not (total := len(video.frames)):
        raise ValueError(f"{name}: it has no frames")
    groups = plan_frame_groups(VideoMetadata(total, fps), options)
    needed = sorted({frame for group in groups for frame in group})

    def frames() -> Iterator[tuple[int, np.ndarray]]:
        for i in needed:
            if not isinstance(video.frames[i], (np.ndarray, Image.Image)):
                raise ValueError(f"{name}: frame {i} is a {type(video.frames[i]).__name__}, not an array or PIL image")
            yield i, load_rgb(video.frames[i], fetch, max_pixels)

    return tuple(slice_frame_groups(_check_frame_sizes(frames(), name), groups, slice_frame))


def _check_frame_sizes(frames: Iterable[tuple[int, np.ndarray]], name: str) -> Iterator[tuple[int, np.ndarray]]:
    shape = None
    for i, frame in frames:
        shape = shape or frame.shape
        if frame.shape != shape:
            raise ValueError(f"{name}: frame {i} is {frame.shape[1]}x{frame.shape[0]}, earlier ones {shape[1]}x{shape[0]}")
        yield i, frame


def _slice_file(
    data: bytes | Path,
    options: MediaOptions,
    slice_frame: Callable[[np.ndarray], SlicedImage],
    metadata: VideoMetadata,
    max_pixels: int,
    name: str,
    limits: VideoLimits,
) -> tuple[SlicedImage, ...]:
    def slice_all(metadata: VideoMetadata) -> tuple[list[FrameGroup], list[SlicedImage]]:
        groups = limits.frame_groups(metadata, options, name)
        frames = _check_frame_sizes(decode_frames(data, groups, name, limits, max_pixels), name)
        return groups, slice_frame_groups(frames, groups, slice_frame)

    groups, images = slice_all(metadata)
    if len(images) < len(groups):
        # The container's number of frames is too high (because of an edit list, for example), so the frames
        # are counted.
        groups, images = slice_all(_count_frames(data, metadata, max_pixels, name, limits))
    assert len(images) == len(groups)
    return tuple(images)


def _open(data: bytes | Path) -> InputContainer:
    """Opens a video file.

    Playlists, session descriptions and image sequences are refused, because they name other files or hosts.
    """
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file" if isinstance(data, Path) else ""}
    return av.open(data if isinstance(data, Path) else io.BytesIO(data), mode="r", options=options)


def _stream(container: InputContainer, max_pixels: int, name: str) -> VideoStream:
    """Returns the first video stream that is not a cover image.

    Its decoder refuses frames of more than twice `max_pixels`, because a frame may be larger than the
    container says. It counts the blocks and edges that it pads a frame with, which are most of a small one:
    2 * MIN_DECODED_PIXELS are always allowed.

    Raises:
        ValueError: there is no such stream, or no decoder for it.
    """
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise ValueError(f"{name}: no decoder for its video stream")
            stream.codec_context.options = {"max_pixels": str(2 * max(max_pixels, MIN_DECODED_PIXELS))}
            stream.thread_type = "AUTO"
            return stream
    raise ValueError(f"{name}: it has no video stream")


def probe(data: bytes | Path, max_pixels: int, name: str, limits: VideoLimits = NO_VIDEO_LIMITS) -> VideoMetadata:
    """Reads the container's metadata of its first video stream.

    If it lacks the number of frames (in WebM, for example), all frames are decoded and counted.
    Source: transformers' video_utils.py, `read_video_pyav`.
    """
    with _open(data) as container:
        stream = _stream(container, max_pixels, name)
        check_size(stream.height, stream.width, max_pixels, name)
        rate, frames, height, width = stream.average_rate, stream.frames, stream.height, stream.width
    if not rate or rate < 0:
        raise ValueError(f"{name}: the video has no frame rate")
    rate = Fraction(rate.numerator, rate.denominator)  # some versions of PyAV have their own rational type
    metadata = VideoMetadata(frames, rate, height, width)
    return metadata if frames > 0 else _count_frames(data, metadata, max_pixels, name, limits)


def _count_frames(data: bytes | Path, metadata: VideoMetadata, max_pixels: int, name: str, limits: VideoLimits) -> VideoMetadata:
    """Returns the metadata with the number of frames that the file has."""
    with _open(data) as container:
        frames = sum(1 for _ in limits.enforce(container.decode(_stream(container, max_pixels, name)), name))
    if not frames:
        raise ValueError(f"{name}: the video has no frames")
    return replace(metadata, num_frames=frames)


def decode_frames(
    data: bytes | Path,
    groups: list[FrameGroup],
    name: str,
    limits: VideoLimits = NO_VIDEO_LIMITS,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the groups' frames as (index, uint8 [height, width, 3]); stops decoding at the last one."""
    needed = {frame for group in groups for frame in group}
    last = max(needed)
    with _open(data) as container:
        for i, frame in enumerate(limits.enforce(container.decode(_stream(container, max_pixels, name)), name)):
            if i in needed:
                yield i, frame.to_ndarray(format="rgb24")
            if i == last:
                return


def video_lookup_table(config: MediaConfig) -> np.ndarray:
    """Returns the normalised value of each byte of a frame, float32 [3, 256].

    The value is (x - 255 mean) / (255 std), computed in float32.

    Source: transformers' image_processing_backends.py, `rescale_and_normalize`.
    """
    scale = np.float32(1 / config.rescale_factor)
    mean, std = (np.array(x, np.float32)[:, None] * scale for x in (config.image_mean, config.image_std))
    table = (np.arange(256, dtype=np.float32) - mean) / std
    table.setflags(write=False)
    return table
