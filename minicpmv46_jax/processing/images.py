"""Image sources -> RGB pixels -> slices of patches.

Results equal transformers' MiniCPMV4_6ImageProcessorPil, bit for bit.

The conversion to RGB follows transformers. It depends on the source where an image has an EXIF rotation or
transparency:
- Files, bytes and URLs follow `load_image`: the EXIF rotation is applied, then `convert("RGB")` drops the
  alpha channel.
- PIL images follow the image processor: the rotation is not applied, and transparency is blended on white.

The image processor also runs after `load_image`. Pillow keeps one kind of transparency in `convert("RGB")`: a
single transparent colour (PNG's tRNS, GIF). So its pixels become white in files too.
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

# Pillow warns above this size, and refuses an image of twice this size.
MAX_PIXELS = 89_478_485
# Each scan of a JPEG passes over all pixels, and a scan may have no data. Encoders write about ten.
MAX_JPEG_SCANS = 100
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_ORIENTATION = 0x0112  # EXIF's tag
MIN_BANDED_PIXELS = 100_000  # below this output size, starting threads costs more than they save

# Formats that contain pixels. Pillow reads more, but EPS and WMF are drawing programs and others are rare.
# Old versions of Pillow lack AVIF.
Image.init()
FORMATS = tuple(
    name for name in "AVIF BMP DIB GIF ICO JPEG JPEG2000 PCX PNG PPM QOI SGI TGA TIFF WEBP".split() if name in Image.OPEN
)

Resize = Callable[[np.ndarray, int, int], np.ndarray]
"""Function (uint8 [height, width, 3], new height, new width) -> uint8 [new height, new width, 3]."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""


class ImageSlice(NamedTuple):
    """The patches of one view, without a position in a prompt.

    Attributes:
        pixels: uint8 [h*w, 3*patch*patch], patches in row-major order.
        grid: (h, w) in patches.
    """

    pixels: np.ndarray
    grid: tuple[int, int]


class SlicedImage(NamedTuple):
    """An image as its source view and its slices.

    Attributes:
        slices: the source view, then the slices in row-major order.
        grid: (rows, columns) of the slices; (0, 0) without slices.
    """

    slices: tuple[ImageSlice, ...]
    grid: tuple[int, int]


class SliceLayout(NamedTuple):
    """Sizes of an image's views, known before its pixels are.

    Attributes:
        grid: (rows, columns) of the slices; (0, 0) without slices.
        view: (height, width) of the source view in pixels.
        sliced: (height, width) in pixels of the resized image that `grid` splits into slices; (0, 0) without
            slices.
    """

    grid: tuple[int, int]
    view: tuple[int, int]
    sliced: tuple[int, int]

    @property
    def num_views(self) -> int:
        """Number of views: the source view and the slices."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def num_pixels(self) -> int:
        """Pixels of all views; each takes three bytes in `ImageSlice`."""
        return self.view[0] * self.view[1] + self.sliced[0] * self.sliced[1]


def check_size(height: int, width: int, max_pixels: int, name: str) -> None:
    """Raises ValueError for an image without pixels or with more than `max_pixels`."""
    if height < 1 or width < 1:
        raise ValueError(f"{name}: the image has no pixels, {width}x{height}")
    if height * width > max_pixels:
        raise ValueError(f"{name}: {width}x{height} = {height * width} pixels, more than the {max_pixels} allowed")


def load_rgb(source: Any, fetch: FetchMedia, max_pixels: int = MAX_PIXELS, name: str | None = None) -> np.ndarray:
    """Returns an image source's pixels, uint8 RGB [height, width, 3].

    Args:
        source: a path, URL or data URL (str), `pathlib.Path`, bytes, `PIL.Image.Image`, or a uint8 array
            [height, width] or [height, width, 3]. The module's docstring describes rotation and transparency.
        fetch: reads URLs and paths.
        max_pixels: a larger image is refused before it is decoded. Pillow refuses 178,956,970 pixels and more
            in any case.
        name: the source's name in error messages; by default derived from the source.
    Raises:
        ValueError: the source is not an image, or is broken, truncated, empty, too large or not available.
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
        _check_header(image, data, max_pixels, name)
        return _decode_pixels(_decode_file_image, image, name)


def measure_image(source: str | bytes | bytearray | Path, fetch: FetchMedia, max_pixels: int, name: str) -> tuple[int, int]:
    """Returns an image file's (height, width) after its EXIF rotation, from its header alone.

    A PNG whose EXIF data follows its pixels counts as not rotated.

    Args:
        source, fetch, max_pixels, name: see `load_rgb`.
    Raises:
        ValueError: the source is not an image, or its header has a size that `load_rgb` refuses.
    """
    data = read(source, fetch)
    with _open(data, name) as image:
        _check_header(image, data, max_pixels, name)
        return (image.width, image.height) if _orientation(image) in _TRANSPOSED else (image.height, image.width)


def _orientation(image: Image.Image) -> Any:
    if image.format == "PNG" and "exif" not in image.info:  # `getexif` would decode the pixels to look behind them
        return 1
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF data; decoding reports it
        return 1


def _check_header(image: Image.Image, data: bytes | Path, max_pixels: int, name: str) -> None:
    """Raises ValueError for an opened image that is too large, or whose decoding would take too long."""
    check_size(image.height, image.width, max_pixels, name)
    try:
        if image.format == "JPEG":
            _check_scans(data, name)
        elif image.format == "ICO":
            _check_icons(image, max_pixels, name)
    except OSError as error:
        raise ValueError(f"{name}: the image cannot be opened ({error})") from None


def _check_scans(data: bytes | Path, name: str) -> None:
    scans = (data.read_bytes() if isinstance(data, Path) else data).count(b"\xff\xda")  # this marker never occurs inside a scan
    if scans > MAX_JPEG_SCANS:
        raise ValueError(f"{name}: a JPEG of {scans} scans, more than the {MAX_JPEG_SCANS} allowed")


def _check_icons(image: Any, max_pixels: int, name: str) -> None:
    """Checks the PNG images in an icon, whose sizes may differ from those in the icon's directory."""
    for entry in image.ico.entry:
        image.ico.buf.seek(entry.offset)
        header = image.ico.buf.read(24)
        if header.startswith(b"\x89PNG") and len(header) == 24:
            check_size(int.from_bytes(header[20:]), int.from_bytes(header[16:20]), max_pixels, name)


def _rgb_from_array(array: np.ndarray, max_pixels: int, name: str) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(f"{name}: expected uint8 [height, width, 3] or [height, width], got {array.dtype} {array.shape}")
    check_size(array.shape[0], array.shape[1], max_pixels, name)
    return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array


def _open(data: bytes | Path, name: str) -> Image.Image:
    try:
        return Image.open(data if isinstance(data, Path) else io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: {error}") from None  # Pillow's message has both numbers
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name}: not an image that Pillow can read") from None
    except Exception as error:  # Pillow's plugins raise any exception for malformed bytes
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
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy an RGB image


def _blend_on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return _to_rgb(image)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def resize_pillow(pixels: np.ndarray, new_height: int, new_width: int) -> np.ndarray:
    """Resizes uint8 [height, width, 3] to uint8 [new_height, new_width, 3] with Pillow's bicubic filter.

    Pillow resizes along rows and then along columns, and rounds to bytes after each pass. Here several
    threads run each pass in bands. The bytes are the same, because a row (or a column, in the second pass)
    depends on no other. Images that become lower take one call, because Pillow 13 resizes some of them along
    columns first.
    """
    image = Image.fromarray(pixels)
    if new_height * new_width < MIN_BANDED_PIXELS or new_height < image.height:
        return np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    height = image.height
    rows = [((0, start, image.width, end), (0, start, new_width, end)) for start, end in _band_ranges(height)]
    wide = _resize_bands(image, (new_width, height), rows)
    columns = [((start, 0, end, height), (start, 0, end, new_height)) for start, end in _band_ranges(new_width)]
    return np.asarray(_resize_bands(wide, (new_width, new_height), columns))


def _resize_bands(image: Image.Image, size: tuple[int, int], bands: list[tuple[Box, Box]]) -> Image.Image:
    """Returns an image of `size`; threads resize each band from its source box to its target box."""

    def resize_band(band: tuple[Box, Box]) -> Image.Image:
        box, (left, top, right, bottom) = band
        return image.crop(box).resize((right - left, bottom - top), Image.Resampling.BICUBIC)

    resized = Image.new(image.mode, size)
    for (_, target), part in zip(bands, pixel_pool().map(resize_band, bands), strict=True):
        resized.paste(part, target)
    return resized


def _band_ranges(size: int) -> list[tuple[int, int]]:
    ends = [size * i // num_threads() for i in range(num_threads() + 1)]
    return [(start, end) for start, end in itertools.pairwise(ends) if end > start]


def patchify(image: np.ndarray, patch: int) -> ImageSlice:
    """Splits uint8 [h*patch, w*patch, 3] into patches [h*w, 3*patch*patch], each in (channel, y, x) order."""
    h, w = image.shape[0] // patch, image.shape[1] // patch
    patches = image.reshape(h, patch, w, patch, 3).transpose(0, 2, 4, 1, 3)
    return ImageSlice(patches.reshape(h * w, 3 * patch * patch), (h, w))


def slice_image(image: np.ndarray, config: MediaConfig, options: MediaOptions, resize: Resize) -> SlicedImage:
    """Returns an image's source view and, if it is large, its slices.

    Args:
        image: uint8 [height, width, 3].
        config: the checkpoint's settings.
        options: the request's options.
        resize: bicubic resize of the reference: `resize_pillow` for images, `resize.resize_bicubic` for video
            frames.
    """
    layout, patch = slice_layout(image.shape[0], image.shape[1], config, options), config.patch_size
    if layout.grid == (0, 0):
        return SlicedImage((patchify(resize(image, *layout.view), patch),), layout.grid)
    rows, columns = layout.grid
    with ThreadPoolExecutor(1) as thread:
        source_view = thread.submit(lambda: patchify(resize(image, *layout.view), patch))
        bands = np.split(resize(image, *layout.sliced), rows, axis=0)
        slices = [patchify(part, patch) for band in bands for part in np.split(band, columns, axis=1)]
    return SlicedImage((source_view.result(), *slices), layout.grid)


def slice_layout(height: int, width: int, config: MediaConfig, options: MediaOptions) -> SliceLayout:
    """Returns the sizes of the views of an image of this size. Arithmetic only."""
    resolution, multiple = config.scale_resolution, config.patch_size * options.merge_factor
    grid = slice_grid(height, width, options.max_slice_nums, resolution) if config.slice_mode else None
    view = view_size(height, width, resolution, multiple, enlarge=grid is None)
    if grid is None:
        return SliceLayout((0, 0), view, (0, 0))
    return SliceLayout(grid, view, sliced_size(height, width, grid, resolution, multiple))


def image_lookup_table(config: MediaConfig) -> np.ndarray:
    """Returns the normalised value of each byte of an image, float32 [3, 256].

    The arithmetic is that of transformers' image_transforms.py. Bytes are scaled in float64 and rounded to
    float32; mean and deviation are applied in float32.
    """
    scaled = (np.arange(256, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    mean, std = (np.array(x, np.float32)[:, None] for x in (config.image_mean, config.image_std))
    table = (scaled - mean) / std
    table.setflags(write=False)
    return table
