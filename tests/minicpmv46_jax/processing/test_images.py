"""Images: sizes, slices and pixels equal transformers' MiniCPMV4_6ImageProcessorPil; errors are one line."""

import base64
import contextlib
import http.server
import io
import json
import threading
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers.image_utils import load_image
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from convert.demo.random_checkpoint import preprocessor_config
from minicpmv46_jax.processing import MediaConfig, MediaOptions, fetch, images
from minicpmv46_jax.processing.images import image_lookup_table, load_rgb, resize_pillow, slice_image
from minicpmv46_jax.processing.options import read_configs
from minicpmv46_jax.processing.slicing import slice_grid, sliced_size, view_size

SECTION = preprocessor_config()
ODD = {"image_mean": [0.481, 0.458, 0.408], "image_std": [0.269, 0.261, 0.276]}  # CLIP's values, for which rounding matters
PHOTOS = [Path(path) for path in load_sample_images().filenames]


def config(**changes) -> MediaConfig:
    return MediaConfig.from_dict(SECTION | changes, "test")


def patches(packed: np.ndarray, patch: int = 14) -> np.ndarray:
    """Converts the reference's [1, 3, patch, N * patch] to [N, 3 * patch * patch]."""
    return packed[0].reshape(3, patch, -1, patch).transpose(2, 0, 1, 3).reshape(-1, 3 * patch * patch)


def assert_as_reference(source, image, settings: MediaConfig | None = None, section: dict | None = None, **overrides):
    """Asserts that our result for `source` equals the reference's for `image`, bit for bit."""
    settings, section = settings or config(), section or SECTION
    rgb = load_rgb(source, fetch)
    ours = slice_image(rgb, settings, settings.options.with_overrides(overrides, "test"), resize_pillow)
    theirs = MiniCPMV4_6ImageProcessorPil(**section)([image], return_tensors="np", **overrides)
    table = image_lookup_table(settings)
    values = [np.concatenate([table[c][part] for c, part in enumerate(np.split(x.pixels, 3, axis=1))], 1) for x in ours.slices]
    assert np.concatenate(values).dtype == theirs["pixel_values"].dtype == np.float32
    assert np.array_equal(np.concatenate(values), patches(theirs["pixel_values"]))
    assert [list(image_slice.grid) for image_slice in ours.slices] == theirs["target_sizes"].tolist()
    assert list(ours.grid) == list(theirs["grids"][0])
    return ours


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


# ---- sizes: arithmetic against the reference's methods

SIDE = st.one_of(st.integers(1, 3000), st.integers(1, 20000))


@settings(max_examples=3000, deadline=None)
@given(SIDE, SIDE, st.integers(1, 16), st.sampled_from(["16x", "4x"]), st.sampled_from([448, 336, 980]))
def test_sizes_and_grids_equal_the_reference(height, width, slices, mode, resolution):
    reference, size = REFERENCE, (height, width)
    multiple = 14 * MediaOptions(max_slice_nums=1, use_image_id=True, downsample_mode=mode).merge_factor
    expected = reference.get_sliced_grid(size, slices, resolution)
    grid = slice_grid(height, width, slices, resolution)
    assert grid == (None if expected is None else tuple(expected))
    for enlarge in (False, True):
        ours = view_size(height, width, resolution, multiple, enlarge)
        assert ours == reference.find_best_resize(size, resolution, 14, mode, enlarge)
    some = grid or (2, 3)
    assert sliced_size(height, width, some, resolution, multiple) == reference.get_refine_size(
        size, list(some), resolution, 14, mode, True
    )


REFERENCE = MiniCPMV4_6ImageProcessorPil(**SECTION)


def test_documented_grid_of_a_720p_image():
    ours = slice_image(noise(720, 1280), config(), config().options, resize_pillow)
    assert ours.grid == (2, 3)
    assert [image_slice.grid for image_slice in ours.slices] == [(24, 44)] + [(28, 36)] * 6


# ---- pixels


@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("slices", [1, 4, 9])
@pytest.mark.parametrize("size", [(1, 1), (3, 900), (448, 448), (449, 448), (720, 1280), (1300, 610), (30, 20000)])
def test_pixels_equal_the_reference(size, slices, mode):
    array = noise(*size)
    assert_as_reference(array, Image.fromarray(array), max_slice_nums=slices, downsample_mode=mode)


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 900), st.integers(4, 900), st.integers(1, 9), st.sampled_from(["16x", "4x"]), st.integers(0, 99))
def test_pixels_of_any_size_equal_the_reference(height, width, slices, mode, seed):
    array = noise(height, width, seed=seed)
    assert_as_reference(array, Image.fromarray(array), max_slice_nums=slices, downsample_mode=mode)


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda path: path.name)
@pytest.mark.parametrize("way", [str, Path, Path.read_bytes, lambda path: path.as_uri()])
def test_photos(photo, way):
    assert_as_reference(way(photo), load_image(str(photo)))


@pytest.mark.parametrize(
    "changes",
    [ODD, {"image_mean": 0.3, "image_std": 0.7}, {"slice_mode": False}, {"patch_size": 16}, {"rescale_factor": 0.01}],
    ids=str,
)
def test_other_settings(changes):
    section = SECTION | changes
    array = noise(500, 700)
    if "patch_size" in changes:  # `patches` above assumes 14
        grid = slice_image(array, config(**changes), config().options, resize_pillow).slices[0].grid
        theirs = MiniCPMV4_6ImageProcessorPil(**section)([Image.fromarray(array)], return_tensors="np")
        assert list(grid) == theirs["target_sizes"][0].tolist()
    else:
        assert_as_reference(array, Image.fromarray(array), config(**changes), section)


def test_lookup_table_equals_the_reference():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    settings = config(**ODD)
    reference = MiniCPMV4_6ImageProcessorPil(**SECTION | ODD)
    scaled = reference.rescale(ramp.transpose(2, 0, 1), 1 / 255)
    expected = reference.normalize(scaled, settings.image_mean, settings.image_std)[:, 0]
    assert np.array_equal(image_lookup_table(settings), expected)
    assert not image_lookup_table(settings).flags.writeable


# ---- image modes


def palette(transparency) -> Image.Image:
    image = Image.fromarray(noise(60, 80)).quantize(8)
    image.info["transparency"] = transparency
    return image


def keyed(mode: str, colour) -> Image.Image:
    image = Image.fromarray((noise(60, 80) // 128) * 128).convert(mode)
    image.info["transparency"] = colour
    return image


def images_by_kind() -> dict[str, Image.Image]:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    turned = Image.fromarray(noise(60, 80))
    turned.info["exif"] = exif.tobytes()
    return {
        "RGBA": Image.fromarray(noise(60, 80, 4), "RGBA"),
        "LA": Image.fromarray(noise(60, 80, 2), "LA"),
        "L": Image.fromarray(noise(60, 80, 1)[..., 0]),
        "1": Image.fromarray(noise(60, 80, 1)[..., 0]).convert("1"),
        "P": Image.fromarray(noise(60, 80)).quantize(8),
        "P, one colour clear": palette(3),
        "RGB, one colour clear": keyed("RGB", (0, 0, 0)),
        "L, one colour clear": keyed("L", 0),
        "P, clear by degrees": palette(bytes(range(0, 256, 32))),
        "16 bits": Image.fromarray(np.random.default_rng(0).integers(0, 65536, (60, 80), np.uint16)),
        "CMYK": Image.fromarray(noise(60, 80, 4), "CMYK"),
        "EXIF": turned,
    }


@pytest.mark.parametrize("kind", images_by_kind())
def test_image_modes_equal_the_reference(kind, tmp_path):
    image = images_by_kind()[kind]
    assert_as_reference(image, images_by_kind()[kind])  # two copies, because Pillow's conversions change a palette in place
    path = tmp_path / ("picture.tif" if kind == "CMYK" else "picture.png")
    image.save(path, **{key: image.info[key] for key in ("exif", "transparency") if key in image.info})
    upright = load_image(str(path))
    assert_as_reference(path, upright)
    assert_as_reference(f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", upright)
    with Image.open(path) as ours, Image.open(path) as theirs:
        if kind == "EXIF":
            assert upright.size == ours.size[::-1]
        assert_as_reference(ours, theirs)


def test_transparency_is_blended_in_pil_images_and_dropped_in_files(tmp_path):
    image = Image.new("RGBA", (20, 20), (10, 20, 30, 0))
    image.save(tmp_path / "clear.png")
    assert load_rgb(image, fetch)[0, 0].tolist() == [255, 255, 255]
    assert load_rgb(tmp_path / "clear.png", fetch)[0, 0].tolist() == [10, 20, 30]


def test_gray_arrays_become_rgb():
    gray = noise(40, 50, 1)
    assert np.array_equal(load_rgb(gray[..., 0], fetch), np.repeat(gray, 3, axis=2))


# ---- http


class Handler(http.server.BaseHTTPRequestHandler):
    photo = PHOTOS[0].read_bytes()

    def do_GET(self):
        if self.path == "/late":
            time.sleep(1.5)
        self.send_response(404 if self.path == "/absent" else 200)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has closed the connection, as expected
            self.wfile.write(self.photo)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_http_image(server):
    assert_as_reference(f"{server}/photo.jpg", load_image(str(PHOTOS[0])))


def test_http_refusals(server):
    with pytest.raises(ValueError, match=r"/absent: HTTP status 404"):
        load_rgb(f"{server}/absent", fetch)
    with pytest.raises(ValueError, match=r"/big: more than the 1000 bytes allowed"):
        load_rgb(f"{server}/big", partial(fetch, max_bytes=1000))
    with pytest.raises(ValueError, match=r"/late: no answer within 0.3 seconds"):
        load_rgb(f"{server}/late", partial(fetch, timeout_s=0.3))
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/x: "):
        load_rgb("http://127.0.0.1:9/x", fetch)


def test_custom_fetch_gets_every_string_except_data_urls():
    seen = []

    def own(url):
        seen.append(url)
        raise ValueError(f"{url}: not allowed here")

    for source in ("/etc/passwd", "file:///etc/passwd", "http://localhost/"):
        with pytest.raises(ValueError, match="not allowed here"):
            load_rgb(source, own)
    assert seen == ["/etc/passwd", "file:///etc/passwd", "http://localhost/"]
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")
    load_rgb(f"data:image/png;base64,{base64.b64encode(pixel.getvalue()).decode()}", own)
    assert len(seen) == 3


# ---- bad input


def png_header(side: int) -> bytes:
    """Returns the beginning of a square PNG: its header without pixels."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big") + b"\0\0\0\x10IDAT"


@pytest.mark.parametrize(
    "source, message",
    [
        (b"", "0 bytes: it is empty"),
        (b"hello" * 9, "45 bytes: not an image that Pillow can read"),
        (PHOTOS[0].read_bytes()[:50_000], "50000 bytes: the image is broken or truncated"),
        ("/no/such/file.png", "/no/such/file.png: no such file"),
        (Path("/no/such/file.png"), "/no/such/file.png: no such file"),
        ("/", "/: not a file"),
        ("a" * 5000, r"aaa\.\.\. \(5000 characters\): "),
        ("a\0b", "not a usable file name|no such file"),
        ("ftp://host/cat.png", "ftp://host/cat.png: unsupported scheme 'ftp'; supported are http, https, file and data"),
        ("data:image/png;base64,%%%%", "data URL: broken base64 of 4 characters"),
        ("data:image/png;base64,é", "data URL: broken base64 of 1 characters"),
        ("data:image/png,abc", "data URL: expected data:<type>;base64,<content>"),
        ("data:image/png;base64,", "data URL: it is empty"),
        ("data:image/png;base64,aGVsbG8=", "data URL: not an image that Pillow can read"),
        (Image.new("RGB", (0, 5)), "Image: the image has no pixels, 0x5"),
        (np.zeros((0, 5, 3), np.uint8), "ndarray: the image has no pixels, 5x0"),
        (np.zeros((4, 5, 3), np.float32), r"expected uint8 \[height, width, 3\] or \[height, width\], got float32 \(4, 5, 3\)"),
        (np.zeros((4, 5, 4), np.uint8), r"got uint8 \(4, 5, 4\)"),
        (7, "int: not an image source"),
        (None, "NoneType: not an image source"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_bad_images(source, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_rgb(source, fetch)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("default")
def test_program_formats_are_refused():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ValueError, match="not an image that Pillow can read"):
        load_rgb(eps, fetch)


def test_decompression_bombs_are_refused_before_decoding():
    with pytest.raises(ValueError, match=r"3600000000 pixels.*178956970 pixels"):
        load_rgb(png_header(60_000), fetch)  # Pillow's own limit
    limit = r"data URL: 640x427 = 273280 pixels, more than the 273279 allowed"
    with pytest.raises(ValueError, match=limit):
        load_rgb(f"data:image/jpeg;base64,{base64.b64encode(PHOTOS[0].read_bytes()).decode()}", fetch, 640 * 427 - 1)
    assert load_rgb(PHOTOS[0], fetch, 640 * 427).shape == (427, 640, 3)
    for picture in (Image.new("RGB", (30, 10)), np.zeros((10, 30, 3), np.uint8)):
        with pytest.raises(ValueError, match="30x10 = 300 pixels, more than the 299 allowed"):
            load_rgb(picture, fetch, 299)
    # This file has no pixels, so decoding it would raise another error.
    with pytest.raises(ValueError, match="9000x9000 = 81000000 pixels, more than the 1000000 allowed"):
        load_rgb(png_header(9000), fetch, 10**6)
    with pytest.raises(ValueError, match="broken or truncated"):
        load_rgb(png_header(9000), fetch)


# ---- a checkpoint's files


def write(folder: Path, **files: dict) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_config_files_are_read_in_transformers_order(tmp_path):
    write(tmp_path, preprocessor_config=SECTION)
    images, videos = read_configs(tmp_path)
    assert images == videos
    assert images.options == MediaOptions(9, True, "16x", 128, 1)
    write(tmp_path, video_preprocessor_config=SECTION | {"max_slice_nums": 2, "stack_frames": 3, "use_image_id": False})
    images, videos = read_configs(tmp_path)
    assert (images.options.max_slice_nums, videos.options.max_slice_nums, videos.options.stack_frames) == (9, 2, 3)
    assert videos.options.use_image_id is True  # the reference reads it from the image processor
    nested = {"image_processor": SECTION | {"max_slice_nums": 5}, "video_processor": SECTION | {"max_num_frames": 64}}
    write(tmp_path, processor_config=nested)
    images, videos = read_configs(tmp_path)
    assert (images.options.max_slice_nums, videos.options.max_num_frames) == (5, 64)


def test_config_saved_by_transformers_is_read(tmp_path):
    MiniCPMV4_6ImageProcessorPil(**SECTION | {"downsample_mode": "4x"}).save_pretrained(tmp_path)
    images, _ = read_configs(tmp_path)
    assert images == config(downsample_mode="4x")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_size": None}, "patch_size is missing"),
        ({"image_mean": None}, "image_mean is missing"),
        ({"use_image_id": None}, "use_image_id is missing"),
        ({"patch_sise": 14}, "unknown field 'patch_sise'"),
        ({"do_normalize": False}, "do_normalize = False is not supported, only True"),
        ({"resample": 2}, "resample = 2 is not supported, only 3"),
        ({"size": {"height": 3}}, r"size = \{'height': 3\} is not supported, only null"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std must not be zero"),
        ({"image_std": [0.5, 0.5]}, "image_std must be a number or a list of three"),
        ({"max_slice_nums": 0}, "max_slice_nums must be an integer from 1 to 4096, got 0"),
        ({"patch_size": "14"}, "patch_size must be an integer >= 1, got '14'"),
        ({"slice_mode": 1}, "slice_mode must be true or false, got 1"),
        ({"rescale_factor": 0}, "rescale_factor must be a number above 0, got 0"),
    ],
    ids=str,
)
def test_bad_settings(changes, message, tmp_path):
    write(tmp_path, preprocessor_config=SECTION | changes)
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {message}"):
        read_configs(tmp_path)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="no image_processor settings; looked for"):
        read_configs(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config.json: not valid JSON"):
        read_configs(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        read_configs(tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_banded_resize_equals_pillow(rng, monkeypatch, seed):
    monkeypatch.setattr(images, "MIN_BANDED_PIXELS", 0)
    height, width, new_height, new_width = (int(n) for n in rng.integers(1, [300, 40, 700, 9][seed % 4] + 1, 4))
    picture = rng.integers(0, 256, (height, width, 3), np.uint8)
    expected = Image.fromarray(picture).resize((new_width, new_height), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize_pillow(picture, new_height, new_width), expected)
