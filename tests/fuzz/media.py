"""Chat requests with images and videos: every format that can be written here, mutated, and bombs."""

import functools
import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from tests.fuzz.run import Case, data_url, is_directed, json_case

MODES = ("RGB", "RGBA", "P", "L", "1", "CMYK", "I;16", "F")
CODECS = {  # container: codecs to write with
    "avi": ("mpeg4", "mjpeg", "ffv1", "rawvideo", "huffyuv", "png"),
    "mp4": ("mpeg4", "libx264", "mjpeg", "libx265"),
    "matroska": ("libx264", "ffv1", "libvpx", "mpeg2video"),
    "webm": ("libvpx", "libvpx-vp9"),
    "mov": ("qtrle", "png", "prores", "mjpeg"),
    "mpegts": ("mpeg2video", "libx264"),
    "gif": ("gif",),
}
PIXELS = {"qtrle": "rgb24", "png": "rgb24", "gif": "rgb8", "mjpeg": "yuvj420p", "prores": "yuv422p10le", "huffyuv": "yuv422p"}
HUGE = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def make(rng: random.Random, index: int, model: str) -> Case:
    """Returns a bomb, or mutated files with random options."""
    if is_directed(rng, index, len(BOMBS)):
        label, build, options = rng.choice(BOMBS)
        return media_case(model, built(build), options, f"bomb: {label}", build in VIDEO_BOMBS)
    names = sorted(images()) + sorted(videos())
    files = [mutated(rng, name) for name in rng.choices(names, k=rng.choice([1, 1, 1, 2]))]
    return media_case(model, files[0][0], odd_options(rng), files[0][1], files[0][2], files[1:])


def media_case(model: str, data: bytes, options: dict[str, Any], label: str, video: bool, more: Any = ()) -> Case:
    """Returns a chat request with files as `data:` URLs."""
    parts = [part(data, video), *(part(other, is_video) for other, _, is_video in more), {"type": "text", "text": "What?"}]
    body = {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": parts}], "mm_processor_kwargs": options}
    return json_case("/v1/chat/completions", body, f"{label} {options}")


def part(data: bytes, video: bool) -> dict[str, Any]:
    kind = "video" if video else "image"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": data_url(data, "video/mp4" if video else "image/png")}}


def odd_options(rng: random.Random) -> dict[str, Any]:
    """Returns `mm_processor_kwargs`, mostly none, else valid ones and extremes."""
    if rng.random() < 0.6:
        return {}
    values: dict[str, list[Any]] = {
        "max_slice_nums": [1, 2, 9, 0, -1, 10**9, 2**63, 1.5],
        "max_num_frames": [1, 4, 0, -1, 10**9, 2**31, 10**30, None],
        "stack_frames": [1, 2, 0, -1, 10**9],
        "downsample_mode": ["4x", "16x", "1x", "", 4],
        "use_image_id": [True, False, 1],
    }
    return {name: rng.choice(values[name]) for name in rng.sample(sorted(values), rng.choice([1, 1, 2, 5]))}


@functools.cache
def images() -> dict[str, bytes]:
    """Returns one small file of each kind that Pillow writes, animations and several modes included."""
    Image.init()
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="PIL")  # formats that Pillow will drop
    pixels = np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3) * 2654435761 % 256
    picture, found = Image.fromarray(pixels.astype(np.uint8)), {}
    frames = [picture.rotate(angle) for angle in (90, 180, 270)]
    for kind in Image.SAVE:
        for mode in MODES:
            for name, options in ((f"{kind} {mode}", {}), (f"{kind} {mode} frames", {"save_all": True, "append_images": frames})):
                file = io.BytesIO()
                try:
                    picture.convert(mode).save(file, kind, **options)
                    found[name] = file.getvalue()
                except Exception:  # Pillow raises many types for modes that a format lacks
                    continue
    file = io.BytesIO()
    picture.save(file, "JPEG", progressive=True, quality=95)
    return found | {"JPEG progressive": file.getvalue()}


@functools.cache
def videos() -> dict[str, bytes]:
    """Returns one small video of each container and codec that PyAV writes here."""
    found = {}
    for container, codecs in CODECS.items():
        for codec in codecs:
            try:
                found[f"video {container} {codec}"] = video(container, codec)
            except (OSError, ValueError):  # not built in; PyAV's errors are both
                continue
    return found


def video(container: str, codec: str, size: tuple[int, int] = (64, 48), frames: int = 6, rate: int = 4) -> bytes:
    """Returns a video of moving noise."""
    file = io.BytesIO()
    with av.open(file, "w", container) as out:
        stream = out.add_stream(codec, rate=Fraction(rate))
        stream.width, stream.height = size
        stream.options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        for i in range(frames):
            pixels = (np.arange(size[0] * size[1] * 3, dtype=np.uint32).reshape(size[1], size[0], 3) * (i + 7)) % 256
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def mutated(rng: random.Random, name: str) -> tuple[bytes, str, bool]:
    """Returns a file's changed bytes, a label, and whether it is sent as a video."""
    files = images() | videos()
    data = bytearray(files[name])
    kinds = [rng.choice((flip, flip, header, header, cut, splice, double)) for _ in range(rng.choice([0, 1, 1, 2, 4]))]
    for kind in kinds:
        data = kind(rng, data, files)
    video = name.startswith("video") ^ (rng.random() < 0.03)
    return bytes(data), f"{name}: {', '.join(kind.__name__ for kind in kinds)}", video


def flip(rng: random.Random, data: bytearray, files: dict[str, bytes]) -> bytearray:
    for _ in range(rng.choice([1, 3, 20]) if data else 0):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return data


def header(rng: random.Random, data: bytearray, files: dict[str, bytes]) -> bytearray:
    """Sets an integer of the first bytes, in either byte order."""
    width = rng.choice([1, 2, 4])
    at = rng.randrange(max(1, min(len(data), 400)))
    number = rng.choice(HUGE) & (256**width - 1)
    data[at : at + width] = number.to_bytes(width, rng.choice(["big", "little"]))
    return data


def cut(rng: random.Random, data: bytearray, files: dict[str, bytes]) -> bytearray:
    return data[: rng.randrange(len(data) + 1)]


def splice(rng: random.Random, data: bytearray, files: dict[str, bytes]) -> bytearray:
    other = files[rng.choice(sorted(files))]
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]


def double(rng: random.Random, data: bytearray, files: dict[str, bytes]) -> bytearray:
    start = rng.randrange(len(data) + 1)
    end = rng.randrange(start, len(data) + 1)
    return data[:end] + data[start:end] * rng.choice([1, 10, 1000][: 1 if end - start > 10_000 else 3]) + data[end:]


# Bombs: small files, or small options, that ask for much.


def flat_png(width: int, height: int) -> bytes:
    """Returns a PNG of one bit a pixel, all black, whose rows are really there."""
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def many_scans(size: int, scans: int) -> bytes:
    """Returns a progressive JPEG whose last scan is repeated."""
    file = io.BytesIO()
    Image.new("L", (size, size)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"


def many_frames(kind: str, size: int, frames: int) -> bytes:
    """Returns an animation."""
    file = io.BytesIO()
    pictures = [Image.new("L", (size, size), i % 256) for i in range(frames)]
    pictures[0].save(file, kind, save_all=True, append_images=pictures[1:])
    return file.getvalue()


def odd_avi(rate: int, scale: int, frames: int | None = None) -> bytes:
    """Returns a small AVI whose header has another rate, scale and length."""
    data = bytearray(video("avi", "mpeg4", frames=3))
    at = data.index(b"strh") + 8
    data[at + 20 : at + 28] = struct.pack("<II", scale, rate)
    if frames is not None:
        data[at + 32 : at + 36] = struct.pack("<I", frames)
    return bytes(data)


def large_frame() -> bytes:
    """Returns a MOV whose header has a small size and whose PNG frame is large."""
    data = video("mov", "png", (16, 16), 1)
    old = data[data.index(b"\x89PNG") :]
    return data[: data.index(b"\x89PNG")] + flat_png(12_000, 12_000) + old


def text_ppm(size: int) -> bytes:
    """Returns a PPM whose pixels are decimal numbers, which Pillow reads in Python."""
    return b"P3 %d %d 255\n" % (size, size) + b"1 " * (3 * size * size)


def ico() -> bytes:
    """Returns an ICO whose directory names a small picture and which contains a large one."""
    inner = flat_png(9000, 9000)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


@functools.cache
def built(build: Callable[[], bytes]) -> bytes:
    """Returns a bomb, built once."""
    return build()


def rate_zero() -> bytes:
    return odd_avi(0, 0)


def slow_avi() -> bytes:
    return odd_avi(1, 100_000_000)


def slowest_avi() -> bytes:
    return odd_avi(1, 2**31 - 1, 2**31 - 1)


def fast_avi() -> bytes:
    return odd_avi(2**31 - 1, 1)


def many_video_frames() -> bytes:
    return video("avi", "mpeg4", (16, 16), 2000, 240)


VIDEO_BOMBS = (rate_zero, slow_avi, slowest_avi, fast_avi, many_video_frames, large_frame)
SLICES = {"max_slice_nums": 10**9}
FRAMES = {"max_num_frames": 10**9}
BOMBS = (
    ("9,400 x 9,400 in slices", lambda: flat_png(9400, 9400), SLICES),
    ("9,400 x 9,400", lambda: flat_png(9400, 9400), {}),
    ("20,000 x 20,000", lambda: flat_png(20_000, 20_000), {}),
    ("1 x 80,000,000", lambda: flat_png(1, 80_000_000), {}),
    ("80,000,000 x 1", lambda: flat_png(80_000_000, 1), {}),
    ("a JPEG of 1,200 scans", lambda: many_scans(4000, 1200), {}),
    ("a JPEG of 20,000 scans", lambda: many_scans(1000, 20_000), {}),
    ("a GIF of 1,000 frames", lambda: many_frames("GIF", 100, 1000), {}),
    ("a WEBP of 200 frames", lambda: many_frames("WEBP", 300, 200), {}),
    ("a TIFF of 1,000 pages", lambda: many_frames("TIFF", 30, 1000), {}),
    ("a PPM of decimal numbers", lambda: text_ppm(1200), {}),
    ("an ICO larger than its directory", ico, {}),
    ("a rate of 0 / 0", rate_zero, {}),
    ("a slow video", slow_avi, {}),
    ("a slow video, all frames", slow_avi, FRAMES),
    ("the slowest video, all frames", slowest_avi, FRAMES),
    ("a fast video", fast_avi, FRAMES),
    ("2,000 frames", many_video_frames, FRAMES),
    ("2,000 frames in slices", many_video_frames, {**FRAMES, **SLICES, "stack_frames": 4}),
    ("a large frame in a small video", large_frame, {}),
)
