"""Image sources -> RGB pictures -> patches, as transformers' MiniCPMV4_6ImageProcessorPil has them, bit for bit.

Two ways lead to RGB, and they differ where a picture is rotated by EXIF or has transparency:
- files, bytes and URLs go as transformers' `load_image` does: turned upright, then `convert("RGB")`, which drops alpha;
- PIL images go as its image processor does: not turned, transparency laid over white.
The image processor comes after `load_image` too, and Pillow lets one kind of transparency through `convert("RGB")`: a
single colour marked as clear (PNG's tRNS, GIF). Its pixels become white in files as well.
"""

import io
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from minicpmv46_jax.processing.options import MediaConfig, MediaOptions
from minicpmv46_jax.processing.slicing import slice_grid, sliced_size, view_size
from minicpmv46_jax.processing.sources import FetchMedia, describe, read
from minicpmv46_jax.processing.threads import num_threads, pixel_pool

# Pillow's own threshold for a warning; it refuses twice that by itself.
MAX_PIXELS = 89_478_485
MIN_BANDED_PIXELS = 100_000  # pixels of a resized picture from which several threads are worth their while

# Formats that hold pixels. Pillow knows more: EPS and WMF are programs that draw, others are rare. (Old ones lack AVIF.)
Image.init()
FORMATS = tuple(
    name for name in "AVIF BMP DIB GIF ICO JPEG JPEG2000 PCX PNG PPM QOI SGI TGA TIFF WEBP".split() if name in Image.OPEN
)

Resize = Callable[[np.ndarray, int, int], np.ndarray]
"""(uint8 [height, width, 3], new height, new width) -> uint8 [new height, new width, 3]."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""


class ImageSlice(NamedTuple):
    """One view before it has a place in a prompt. pixels: uint8 [h*w, 3*patch*patch]; grid: (h, w) in patches."""

    pixels: np.ndarray
    grid: tuple[int, int]


class SlicedImage(NamedTuple):
    """One picture, cut: its source view, then its slices row by row. grid: slices' (rows, columns), (0, 0) for none."""

    slices: tuple[ImageSlice, ...]
    grid: tuple[int, int]


def check_size(height: int, width: int, max_pixels: int, name: str) -> None:
    """Raise ValueError for a picture without pixels or with more than `max_pixels`."""
    if height < 1 or width < 1:
        raise ValueError(f"{name}: the picture has no pixels, {width}x{height}")
    if height * width > max_pixels:
        raise ValueError(f"{name}: {width}x{height} = {height * width} pixels, more than the {max_pixels} allowed")


def load_rgb(source: Any, fetch: FetchMedia, max_pixels: int = MAX_PIXELS, name: str | None = None) -> np.ndarray:
    """Any image source as uint8 RGB [height, width, 3].

    Args:
        source: a path, URL or data URL (str), `pathlib.Path`, bytes, `PIL.Image.Image`, or a uint8 array [height, width]
            or [height, width, 3]. Paths, URLs and bytes are turned upright by their EXIF tag and lose their alpha channel
            (a single colour marked as clear becomes white); PIL images stay as they lie and all transparency becomes
            white. Both as transformers does.
        fetch: how to get at URLs and paths.
        max_pixels: refused above, before decoding. Pillow refuses 178,956,970 and more whatever is said here.
        name: what messages call the source, if not by itself.
    Raises:
        ValueError: not an image, broken, truncated, empty, too large, or not to be had.
    """
    name = name or describe(source)
    if isinstance(source, np.ndarray):
        return _rgb_from_array(source, max_pixels, name)
    if isinstance(source, Image.Image):
        check_size(source.height, source.width, max_pixels, name)
        return _decode_pixels(_blend_on_white, source, name)
    if not isinstance(source, (str, bytes, bytearray, Path)):
        raise ValueError(f"{name}: not an image source; known are str, Path, bytes, PIL.Image.Image and uint8 arrays")
    data = read(source, fetch)
    with _open(data, name) as image:
        check_size(image.height, image.width, max_pixels, name)
        return _decode_pixels(_decode_file_image, image, name)


def _rgb_from_array(array: np.ndarray, max_pixels: int, name: str) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(f"{name}: expected uint8 [height, width, 3] or [height, width], got {array.dtype} {array.shape}")
    check_size(array.shape[0], array.shape[1], max_pixels, name)
    return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array


def _open(data: bytes | Path, name: str) -> Image.Image:
    try:
        return Image.open(data if isinstance(data, Path) else io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: {error}") from None  # Pillow's text has both numbers
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name}: not an image that Pillow can read") from None
    except Exception as error:  # a plugin met bytes its author did not think of
        raise ValueError(f"{name}: the image cannot be opened ({error})") from error


def _decode_pixels(convert: Callable[[Image.Image], Image.Image], image: Image.Image, name: str) -> np.ndarray:
    try:
        return np.asarray(convert(image))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ... for broken bytes
        raise ValueError(f"{name}: the image is broken or truncated ({error})") from error


def _decode_file_image(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    return _blend_on_white(_to_rgb(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _blend_on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return _to_rgb(image)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def resize_pillow(picture: np.ndarray, new_height: int, new_width: int) -> np.ndarray:
    """Pillow's bicubic: uint8 [height, width, 3] -> uint8 [new_height, new_width, 3].

    Pillow resizes along rows and then along columns, in bytes. Both are done here in bands by several threads: the same bytes,
    for no row (then no column) depends on another. Of pictures that become lower Pillow 13 does some the other way round.
    """
    image = Image.fromarray(picture)
    if new_height * new_width < MIN_BANDED_PIXELS or new_height < image.height:
        return np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    height = image.height
    rows = [((0, start, image.width, end), (0, start, new_width, end)) for start, end in _band_ranges(height)]
    wide = _resize_bands(image, (new_width, height), rows)
    columns = [((start, 0, end, height), (start, 0, end, new_height)) for start, end in _band_ranges(new_width)]
    return np.asarray(_resize_bands(wide, (new_width, new_height), columns))


def _resize_bands(image: Image.Image, size: tuple[int, int], bands: list[tuple[Box, Box]]) -> Image.Image:
    """An image of that size, put together of bands of another, each resized from one box to one."""

    def resized(band: tuple[Box, Box]) -> Image.Image:
        box, (left, top, right, bottom) = band
        return image.crop(box).resize((right - left, bottom - top), Image.Resampling.BICUBIC)

    whole = Image.new(image.mode, size)
    for (_, to), part in zip(bands, pixel_pool().map(resized, bands), strict=True):
        whole.paste(part, to)
    return whole


def _band_ranges(size: int) -> list[tuple[int, int]]:
    ends = [size * i // num_threads() for i in range(num_threads() + 1)]
    return [(start, end) for start, end in itertools.pairwise(ends) if end > start]


def patchify(picture: np.ndarray, patch: int) -> ImageSlice:
    """uint8 [h*patch, w*patch, 3] -> patches [h*w, 3*patch*patch], each in (channel, y, x) order."""
    h, w = picture.shape[0] // patch, picture.shape[1] // patch
    patches = picture.reshape(h, patch, w, patch, 3).transpose(0, 2, 4, 1, 3)
    return ImageSlice(patches.reshape(h * w, 3 * patch * patch), (h, w))


def slice_image(picture: np.ndarray, config: MediaConfig, options: MediaOptions, resize: Resize) -> SlicedImage:
    """Resize a uint8 picture [height, width, 3] to its source view and, if it is large, to a grid of slices."""
    height, width, _ = picture.shape
    patch, resolution = config.patch_size, config.scale_resolution
    multiple = patch * options.merge_factor
    grid = slice_grid(height, width, options.max_slice_nums, resolution) if config.slice_mode else None
    view = view_size(height, width, resolution, multiple, enlarge=grid is None)
    if grid is None:
        return SlicedImage((patchify(resize(picture, *view), patch),), (0, 0))
    with ThreadPoolExecutor(1) as beside:
        first = beside.submit(lambda: patchify(resize(picture, *view), patch))
        rows = np.split(resize(picture, *sliced_size(height, width, grid, resolution, multiple)), grid[0], axis=0)
        slices = [patchify(part, patch) for row in rows for part in np.split(row, grid[1], axis=1)]
    return SlicedImage((first.result(), *slices), grid)


def image_lookup_table(config: MediaConfig) -> np.ndarray:
    """float32 [3, 256]: what each byte of an image becomes, by the arithmetic of transformers' image_transforms.py.

    The bytes are scaled in float64 and rounded to float32; mean and deviation are applied in float32.
    """
    scaled = (np.arange(256, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    mean, std = (np.array(x, np.float32)[:, None] for x in (config.image_mean, config.image_std))
    table = (scaled - mean) / std
    table.setflags(write=False)
    return table
