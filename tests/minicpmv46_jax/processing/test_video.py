"""Videos: sampling, composites and pixels equal transformers' MiniCPMV4_6VideoProcessor.

goldens/video.json has its pixels, made with the real torchvision. Its sampling runs here.
"""

import base64
import importlib.util
import io
import json
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import video_utils
from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor

from convert.demo.random_checkpoint import preprocessor_config
from minicpmv46_jax.processing import MediaConfig, Video, fetch
from minicpmv46_jax.processing.images import SlicedImage
from minicpmv46_jax.processing.resize import resize_bicubic
from minicpmv46_jax.processing.video import (
    VideoLimits,
    VideoMetadata,
    decode_frames,
    join_frames,
    load_video,
    plan_frame_groups,
    sample_frames,
    slice_frame_groups,
    video_lookup_table,
)
from tests import ROOT

GOLDENS = ROOT / "tests" / "goldens"
CASES = json.loads((GOLDENS / "video.json").read_text())["cases"]
SECTION = preprocessor_config()
CONFIG = MediaConfig.from_dict(SECTION, "test")

_spec = importlib.util.spec_from_file_location("make_video_goldens", GOLDENS / "make_video_goldens.py")
maker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(maker)


def load(source, max_pixels: int = 10**8, **overrides) -> tuple[SlicedImage, ...]:
    return load_video(source, CONFIG, CONFIG.options.with_overrides(overrides, "test"), fetch, max_pixels)


def values(images: tuple[SlicedImage, ...], table: np.ndarray) -> np.ndarray:
    pixels = np.concatenate([image_slice.pixels for frame in images for image_slice in frame.slices])
    return np.concatenate([table[c][part] for c, part in enumerate(np.split(pixels, 3, axis=1))], axis=1)


def assert_same(ours: tuple[SlicedImage, ...], theirs: tuple[SlicedImage, ...]) -> None:
    assert [frame.grid for frame in ours] == [frame.grid for frame in theirs]
    table = video_lookup_table(CONFIG)
    assert np.array_equal(values(ours, table), values(theirs, table))


# ---- the reference's own results


@pytest.mark.parametrize("case", CASES, ids=lambda case: " and ".join(case["videos"]))
def test_goldens_of_the_reference(case):
    images, indices = (), []
    for name, digest in zip(case["videos"], case["input_sha256"], strict=True):
        number, height, width, fps, _ = maker.CASES[name]
        frames = maker.frames(number, height, width)
        assert maker.sha256(frames) == digest, "the frames' formula has changed, not their processing"
        images += load(Video(frames, fps), **case["options"])
        options = CONFIG.options.with_overrides(case["options"], "test")
        main, between = sample_frames(VideoMetadata(number, fps), options.max_num_frames, options.stack_frames)
        indices.append(main + [i for second in between.values() for i in second])
    assert indices == case["indices"]
    assert len(images) == sum(case["frames"])
    assert [list(frame.grid) for frame in images] == case["grids"]
    assert [list(image_slice.grid) for frame in images for image_slice in frame.slices] == case["target_sizes"]
    assert maker.sha256(values(images, video_lookup_table(CONFIG))) == case["pixels_sha256"]


# ---- torch's resize


def torch_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    tensor = torch.from_numpy(image).permute(2, 0, 1).contiguous()[None]
    out = torch.nn.functional.interpolate(tensor, size=[height, width], mode="bicubic", antialias=True, align_corners=False)
    return out[0].permute(1, 2, 0).numpy()


# From 2, because an assertion of torch's AVX kernel fails for some images one pixel wide.
SIZES = st.tuples(st.integers(2, 500), st.integers(2, 500))


@settings(max_examples=120, deadline=None)
@given(SIZES, SIZES, st.integers(0, 9), st.booleans())
def test_resize_equals_torch(size, new_size, seed, extreme):
    rng = np.random.default_rng(seed)
    # Black and white pixels overshoot the most, so they reach the clipping.
    image = rng.choice(np.array([0, 255], np.uint8), (*size, 3)) if extreme else rng.integers(0, 256, (*size, 3), np.uint8)
    assert np.array_equal(resize_bicubic(image, *new_size), torch_resize(image, *new_size))


@pytest.mark.parametrize("size, new_size", [((2160, 3840), (336, 616)), ((720, 1280), (784, 1176)), ((3, 5), (448, 2000))])
def test_resize_of_large_images_equals_torch(size, new_size):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    assert np.array_equal(resize_bicubic(image, *new_size), torch_resize(image, *new_size))


# ---- sampling and composites


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3000),
    st.one_of(st.fractions("1/4", 240, max_denominator=1001), st.sampled_from([Fraction(30000, 1001), Fraction(25)])),
    st.one_of(st.integers(1, 40), st.just(128)),
    st.integers(1, 7),
)
def test_sampling_equals_the_reference(frames, rate, most, stack):
    metadata = video_utils.VideoMetadata(total_num_frames=frames, fps=float(rate), duration=float(frames / rate))
    expected = MiniCPMV4_6VideoProcessor.sample_frames(SimpleNamespace(), metadata, max_num_frames=most, stack_frames=stack)
    main, between = sample_frames(VideoMetadata(frames, rate), most, stack)
    assert main + [i for second in between.values() for i in second] == expected
    assert list(between) == sorted(between)


def test_sampling_is_bounded_for_a_huge_frame_count():
    main, between = sample_frames(VideoMetadata(2**50, Fraction(30)), 128, 5)
    assert len(main) == 128 and sum(map(len, between.values())) == 512


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 40))
def test_composites_equal_the_reference(number, height, width):
    frames = np.random.default_rng(0).integers(0, 256, (number, height, width, 3), np.uint8)
    expected = MiniCPMV4_6VideoProcessor.concat_frames_as_image(None, torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous())
    assert np.array_equal(join_frames(list(frames)), expected[0].permute(1, 2, 0).numpy())


def test_frame_group_is_sliced_at_its_last_frame():
    groups = [(0,), (1, 2, 3), (4,), (3,), (4,), (9,)]
    given_out = []

    def frames_in_order():
        for i in (0, 1, 2, 3, 4):
            given_out.append(i)
            yield i, np.full((2, 2, 3), i, np.uint8)

    made = []

    def slice_frame(image):
        made.append(given_out[-1])
        return SlicedImage((), image.shape[:2])

    images = slice_frame_groups(frames_in_order(), groups, slice_frame)
    assert made == [0, 3, 3, 4]  # (4,) occurs twice and is sliced once
    # (9,) has no frame. Three frames of 2x2 and two seams of 6 make a row of 2x18 or a column of 18x2, both
    # as good.
    assert [image.grid for image in images] == [(2, 2), (18, 2), (2, 2), (2, 2), (2, 2)]


# ---- files


def encode(frames: np.ndarray, rate=10, codec: str = "mpeg4", container: str = "mp4", out=None, **options: str) -> bytes | None:
    """Encodes a video file; returns its bytes, or writes it to `out`."""
    out = out or io.BytesIO()
    with av.open(out, "w", format=container, options=options) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue() if isinstance(out, io.BytesIO) else None


def all_frames(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


FRAMES = maker.frames(45, 64, 96)


@pytest.mark.parametrize("overrides", [{}, {"stack_frames": 3}, {"max_num_frames": 3}, {"max_num_frames": 2, "stack_frames": 5}])
@pytest.mark.parametrize(
    "codec, container, rate",
    [("mpeg4", "mp4", 10), ("libx264", "mp4", Fraction(30000, 1001)), ("libvpx", "webm", 12), ("mpeg4", "avi", 25)],
)
def test_file_equals_its_decoded_frames(codec, container, rate, overrides):
    data = encode(FRAMES, rate, codec, container)
    frames = all_frames(data)
    assert len(frames) == 45
    with av.open(io.BytesIO(data)) as file:
        assert (file.streams.video[0].frames == 0) == (container == "webm")  # WebM lacks the number, so frames are counted
    assert_same(load(data, **overrides), load(Video(frames, Fraction(rate)), **overrides))


def test_path_url_and_data_url_of_a_file(tmp_path):
    data = encode(FRAMES)
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    expected = load(data)
    for source in (path, str(path), path.as_uri(), f"data:video/mp4;base64,{base64.b64encode(data).decode()}"):
        assert_same(load(source), expected)


def test_frames_as_pil_images_and_lists():
    expected = load(Video(FRAMES, 10))
    assert_same(load(Video([Image.fromarray(frame) for frame in FRAMES], 10)), expected)
    assert_same(load(Video(list(FRAMES), 10.0)), expected)


def test_decoding_stops_at_the_last_frame_needed(tmp_path):
    path = tmp_path / "clip.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 96, 3), np.uint8)
    encode(noise, 10, "libx264", out=str(path), movflags="faststart")  # the index comes first, so a truncated file opens
    data = path.read_bytes()
    broken = data[: len(data) // 2]
    with pytest.raises(av.FFmpegError):
        all_frames(broken)
    assert [i for i, _ in decode_frames(broken, [(3,), (0, 3)], "test")] == [0, 3]


def test_frames_are_counted_if_the_container_has_fewer():
    data = encode(maker.frames(90, 64, 96), 10, container="avi")
    short = data[: len(data) // 2]
    frames = all_frames(short)
    with av.open(io.BytesIO(short)) as file:
        assert file.streams.video[0].frames == 90
    assert 0 < len(frames) < 80  # so frame 80, of second 8, is missing
    assert_same(load(short), load(Video(frames, 10)))


# ---- limits


def load_with_limits(data, limits, **overrides):
    return load_video(data, CONFIG, CONFIG.options.with_overrides(overrides, "test"), fetch, 10**8, limits)


@pytest.mark.parametrize("container", ["mp4", "webm"])  # only mp4 has the number of frames
def test_max_frames(container):
    data = encode(FRAMES, 10, "libvpx" if container == "webm" else "mpeg4", container)
    assert_same(load_with_limits(data, VideoLimits(max_frames=45)), load(data))
    with pytest.raises(ValueError, match=r"more than the 44 (frames )?allowed"):
        load_with_limits(data, VideoLimits(max_frames=44))


def test_max_images():
    data = encode(FRAMES)  # 5 seconds
    assert_same(load_with_limits(data, VideoLimits(max_images=5)), load(data))
    with pytest.raises(ValueError, match="5 frames would be shown, more than the 4 allowed; lower max_num_frames"):
        load_with_limits(data, VideoLimits(max_images=4))
    assert len(load_with_limits(data, VideoLimits(max_images=4), max_num_frames=4)) == 4


def test_max_seconds():
    with pytest.raises(ValueError, match="longer than the 0 seconds allowed"):
        load_with_limits(encode(FRAMES), VideoLimits(max_seconds=0.0))


def test_max_pixels_of_a_composite():
    data = encode(FRAMES)
    height, width, _ = FRAMES[0].shape
    assert load(data, height * width)
    with pytest.raises(ValueError, match=f"more than the {height * width} allowed"):
        load(data, height * width, stack_frames=5)


# ---- bad input


def audio() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="wav") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        file.mux(stream.encode(samples))
        file.mux(stream.encode())
    return out.getvalue()


CLIP = encode(FRAMES)


@pytest.mark.parametrize(
    "source, message",
    [
        (b"", "0 bytes: it is empty"),
        (b"hello" * 99, "495 bytes: not a video, or a broken one"),
        (CLIP[: len(CLIP) // 2], "not a video, or a broken one"),
        (encode(FRAMES, codec="libx264").replace(b"avc1", b"zzzz"), "bytes: no decoder for its video stream"),
        (audio(), "bytes: it has no video stream"),
        (encode(FRAMES[:0]), "bytes: "),
        ("/no/such.mp4", "/no/such.mp4: no such file"),
        ("data:video/mp4;base64,?", "data URL: broken base64 of 1 characters"),
        ("rtsp://host/cam", "unsupported scheme 'rtsp'"),
        (FRAMES, r"ndarray: frames alone have no frame rate, pass Video\(frames, fps\)"),
        (list(FRAMES), r"list: frames alone have no frame rate"),
        (Video(FRAMES, 0), "Video: fps must be a number above 0, got 0"),
        (Video(FRAMES, float("nan")), "fps must be a number above 0, got nan"),
        (Video(FRAMES, "10"), "fps must be a number above 0, got '10'"),
        (Video(FRAMES[:0], 10), "Video: it has no frames"),
        (Video([], 10), "Video: it has no frames"),
        (Video(FRAMES[0], 10), r"expected uint8 \[frames, height, width, 3\], got uint8 \(64, 96, 3\)"),
        (Video(FRAMES / 255, 10), r"expected uint8 \[frames, height, width, 3\], got float64"),
        (Video(["a.png"], 10), "frame 0 is a str, not an array or PIL image"),
        (Video([FRAMES[0], FRAMES[0, :30]], 1), "frame 1 is 96x30, earlier ones 96x64"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_bad_videos(source, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(source)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_max_pixels_of_a_frame():
    with pytest.raises(ValueError, match="bytes: 96x64 = 6144 pixels, more than the 6143 allowed"):
        load(CLIP, max_pixels=6143)
    with pytest.raises(ValueError, match="ndarray: 96x64 = 6144 pixels, more than the 6143 allowed"):
        load(Video(FRAMES, 10), max_pixels=6143)
    assert len(load(CLIP, max_pixels=6144)) == 5


def test_composite_of_second_i_follows_main_frame_i():
    options = CONFIG.options.with_overrides({"max_num_frames": 2, "stack_frames": 2}, "test")
    # 4 seconds at 10 frames per second: main frames are the first and the last, frames between are of seconds
    # 0 and 3.
    assert plan_frame_groups(VideoMetadata(40, 10), options) == [(0,), (5,), (39,)]


@pytest.mark.parametrize(
    "playlist",
    [
        b"ffconcat version 1.0\nfile 'clip.mp4'\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
    ids=["ffconcat", "m3u8", "sdp"],
)
def test_files_that_reference_other_files_are_refused(playlist, tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(CLIP)
    (tmp_path / "list.txt").write_bytes(playlist)
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path / "clip.mp4")
    for source in (playlist, tmp_path / "list.txt"):
        with pytest.raises(ValueError, match="not a video, or a broken one"):
            load(source)
