"""Conversations: token ids, pixels and placeholder positions equal MiniCPMV4_6Processor.apply_chat_template.

The reference runs whole, except for two operations that its video processor takes from torchvision. Here they
are written in plain torch; goldens/video.json (see test_video.py) has torchvision's results.

If MINICPMV46_CHECKPOINT names a folder with the released tokenizer, template and preprocessor_config.json,
the same tests run on it too.
"""

import base64
import copy
import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import AutoTokenizer
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor
from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor
from transformers.video_utils import VideoMetadata

from minicpmv46_jax.processing import Inputs, Processor, Video

RELEASED = os.environ.get("MINICPMV46_CHECKPOINT")


@pytest.fixture(scope="module", params=["demo", *(["released"] if RELEASED else [])])
def folder(request, demo_folder) -> Path:
    return Path(RELEASED) if request.param == "released" else demo_folder


@pytest.fixture
def copy_of_demo(demo_folder, tmp_path) -> Path:
    return shutil.copytree(demo_folder, tmp_path / "model")


@pytest.fixture(scope="module")
def processor(folder) -> Processor:
    return Processor.from_folder(folder)


class TorchVideoProcessor(MiniCPMV4_6VideoProcessor):
    """The reference's video processor, with torchvision's two operations written in torch."""

    def resize(self, image, size, resample=None, **_):
        shape = (size.height, size.width)
        if tuple(image.shape[-2:]) == shape:
            return image
        flat = image.reshape(-1, *image.shape[-3:])
        out = torch.nn.functional.interpolate(flat, shape, mode="bicubic", antialias=True, align_corners=False)
        return out.reshape(*image.shape[:-2], *shape)

    def normalize(self, image, mean, std, inplace=False):
        return image.sub(torch.as_tensor(mean).view(-1, 1, 1)).div(torch.as_tensor(std).view(-1, 1, 1))


class Reference(MiniCPMV4_6Processor):
    def check_argument_for_proper_class(self, argument_name, argument):
        pass


@pytest.fixture(scope="module")
def reference(folder) -> Reference:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Reference(
        image_processor=MiniCPMV4_6ImageProcessorPil.from_pretrained(folder),
        video_processor=TorchVideoProcessor.from_pretrained(folder),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def unpack(packed: torch.Tensor) -> np.ndarray:
    """Converts the reference's [1, 3, 14, N * 14] to [N, 588]."""
    return packed[0].numpy().reshape(3, 14, -1, 14).transpose(2, 0, 1, 3).reshape(-1, 588)


def for_reference(messages: list[dict]) -> tuple[list[dict], list[VideoMetadata]]:
    """Converts our messages to the reference's form: arrays of frames, and their metadata in a list."""
    messages, metadata = [dict(message) for message in messages], []
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = [dict(part) for part in message["content"]]
            for part in message["content"]:
                if isinstance(video := part.get("video"), Video):
                    number = len(video.frames)
                    metadata.append(VideoMetadata(total_num_frames=number, fps=video.fps, duration=number / video.fps))
                    part["video"] = video.frames
    return messages, metadata


def assert_as_reference(processor, reference, messages, template: dict | None = None, **overrides) -> Inputs:
    template = template or {}
    theirs, metadata = for_reference(messages)
    expected = reference.apply_chat_template(
        theirs,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs=overrides | ({"video_metadata": metadata} if metadata else {}),
        **template,
    )
    ours = processor(messages, tools=template.pop("tools", None), chat_template_kwargs=template, **overrides)
    assert_same(processor, ours, expected)
    return ours


def assert_same(processor: Processor, ours: Inputs, expected) -> None:
    assert ours.token_ids.dtype == np.int32
    assert ours.token_ids.tolist() == expected["input_ids"][0].tolist()
    pads = {"": processor.tokenizer.image_token_id, "_videos": processor.tokenizer.video_token_id}
    for suffix, pad in pads.items():
        views = [view for view in ours.views if ours.token_ids[view.start] == pad]
        if f"pixel_values{suffix}" not in expected:
            assert not views
            continue
        assert [list(view.grid) for view in views] == expected[f"target_sizes{suffix}"].tolist()
        values = np.concatenate([view.pixel_values for view in views])
        assert values.dtype == np.float32
        assert np.array_equal(values, unpack(expected[f"pixel_values{suffix}"]))
    assert_places(processor, ours)


def assert_places(processor: Processor, ours: Inputs) -> None:
    """Asserts that the views' placeholders are at their positions, and that there are no others."""
    pads = [processor.tokenizer.image_token_id, processor.tokenizer.video_token_id]
    covered = np.zeros(len(ours.token_ids), bool)
    for view in ours.views:
        span = slice(view.start, view.start + view.num_tokens)
        assert not covered[span].any() and len(set(ours.token_ids[span].tolist())) == 1
        assert not np.isin(ours.token_ids[[span.start - 1, span.stop]], pads).any()
        assert view.num_tokens * (4 if view.downsample_mode == "4x" else 16) == view.grid[0] * view.grid[1] == len(view.pixels)
        covered[span] = True
    assert np.array_equal(covered, np.isin(ours.token_ids, pads))
    assert [view.start for view in ours.views] == sorted(view.start for view in ours.views)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def image(source) -> dict:
    return {"type": "image", "image": source}


def video(source) -> dict:
    return {"type": "video", "video": source}


def user(*parts, **more) -> dict:
    return {"role": "user", "content": list(parts), **more}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8)


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(noise(height, width))


def png(height: int, width: int) -> bytes:
    out = io.BytesIO()
    picture(height, width).save(out, "PNG")
    return out.getvalue()


CLIP = Video(noise(22, 100, 140), 8.0)
TALL_CLIP = Video(noise(11, 700, 300), 4.0)

# ---- against the reference


@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("slices", [1, 3, 9])
@pytest.mark.parametrize("ids", [True, False])
def test_several_images(processor, reference, mode, slices, ids):
    messages = [
        {"role": "system", "content": "Be brief."},
        user(text("One:"), image(picture(500, 900)), text("two:"), image(picture(90, 70)), image(picture(1000, 300))),
        {"role": "assistant", "content": "Seen."},
        user(image(picture(448, 449)), text("And this? ✓ é")),
    ]
    ours = assert_as_reference(processor, reference, messages, downsample_mode=mode, max_slice_nums=slices, use_image_id=ids)
    assert len(ours.image_grids) == 4 and ours.video_grids == ()


@pytest.mark.parametrize("stack, mode", [(1, "16x"), (2, "16x"), (3, "4x"), (5, "16x")])
def test_images_and_videos_in_any_order(processor, reference, stack, mode):
    messages = [
        user(video(CLIP), text("then"), image(picture(500, 600)), video(TALL_CLIP), text("last"), image(picture(60, 50))),
        {"role": "assistant", "content": [text("Yes.")]},
        user(video(CLIP), text("?")),
    ]
    overrides = {"downsample_mode": mode, "stack_frames": stack, "max_slice_nums": 4}
    ours = assert_as_reference(processor, reference, messages, **overrides)
    assert [len(grids) for grids in ours.video_grids] == [3 if stack == 1 else 6] * 3


@pytest.mark.parametrize("overrides", [{"max_num_frames": 2}, {"max_num_frames": 5, "stack_frames": 3}, {"use_image_id": False}])
def test_video_options(processor, reference, overrides):
    assert_as_reference(processor, reference, [user(video(Video(noise(70, 40, 60), 10.0)), text("?"))], **overrides)


def test_photos(processor, reference):
    paths = load_sample_images().filenames
    ours = assert_as_reference(processor, reference, [user(*[{"type": "image", "path": path} for path in paths], text("Which?"))])
    assert ours.image_grids == ((1, 2), (1, 2))
    assert np.array_equal(ours.pixel_values, np.concatenate([view.pixel_values for view in ours.views]))
    assert ours.target_sizes.dtype == np.int32 and ours.target_sizes.tolist() == [list(view.grid) for view in ours.views]


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda s: "|" not in s and "<" not in s)
PART = st.one_of(
    WORDS.map(text),
    st.tuples(st.integers(1, 700), st.integers(1, 700)).map(lambda size: image(picture(*size))),
    st.tuples(st.integers(1, 6), st.integers(8, 80)).map(lambda s: video(Video(noise(s[0], s[1], 30), 2.0))),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PART, min_size=1, max_size=5), st.sampled_from(["16x", "4x"]), st.booleans())
def test_any_conversation(processor, reference, parts, mode, ids):
    assert_as_reference(processor, reference, [user(text("a"), *parts)], downsample_mode=mode, use_image_id=ids)


TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("thinking", [True, False])
def test_template_variables_and_tools(processor, reference, thinking):
    call = {
        "type": "function",
        "id": "1",
        "function": {"name": "look", "arguments": {"at": "sky", "n": 3, "l": [1, {"a": None}]}},
    }
    messages = [
        user(image(picture(50, 60)), text("Look up.")),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "blue"},
        user(text("And?")),
    ]
    ours = assert_as_reference(processor, reference, messages, {"enable_thinking": thinking, "tools": [TOOL]})
    spelt = copy.deepcopy(messages)
    spelt[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    before = copy.deepcopy(spelt[1:])
    again = processor(spelt, tools=[TOOL], chat_template_kwargs={"enable_thinking": thinking})
    assert np.array_equal(again.token_ids, ours.token_ids)
    assert spelt[1:] == before, "the caller's messages were changed"


def test_continue_final_message(processor, reference):
    messages = [user(image(picture(50, 60)), text("?")), {"role": "assistant", "content": "A small"}]
    expected = reference.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", continue_final_message=True
    )
    ours = processor(messages, add_generation_prompt=False, continue_final_message=True)
    assert_same(processor, ours, expected)
    assert processor.tokenizer.decode(ours.token_ids).endswith("A small")


def test_text_alone(processor, reference):
    ours = assert_as_reference(processor, reference, [{"role": "user", "content": "Hello there"}])
    assert ours.views == () and ours.target_sizes.shape == (0, 2)


def test_every_form_of_a_media_part_gives_the_same_inputs(processor, tmp_path):
    data = png(70, 80)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    expected = processor([user(image(path), text("?"))])
    forms = [
        {"type": "image", "image": data},
        {"type": "image", "image": picture(70, 80)},
        {"type": "image", "image": noise(70, 80)},
        {"type": "image", "url": url},
        {"type": "image", "path": str(path)},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
        {"type": "image_url", "image_url": path.as_uri()},
    ]
    for form in forms:
        ours = processor([user(form, text("?"))])
        assert np.array_equal(ours.token_ids, expected.token_ids) and np.array_equal(ours.pixel_values, expected.pixel_values)
    expected = processor([user(video(CLIP), text("?"))])
    for form in ({"type": "video", "video": CLIP}, {"type": "video_url", "video_url": CLIP}):
        assert np.array_equal(processor([user(form, text("?"))]).token_ids, expected.token_ids)


# ---- options


def test_message_options_override_call_options(processor):
    small, large = image(picture(60, 80)), image(picture(900, 900))
    mine = user(large, small, mm_processor_kwargs={"downsample_mode": "4x", "max_slice_nums": 2, "use_image_id": False})
    messages = [
        user(large, text("a")),
        {"role": "assistant", "content": "b"},
        mine,
        {"role": "assistant", "content": "c"},
        user(small),
    ]
    ours = processor(messages, max_slice_nums=1)
    assert ours.image_grids == ((0, 0), (2, 1), (0, 0), (0, 0))
    assert [view.downsample_mode for view in ours.views] == ["16x", "4x", "4x", "4x", "4x", "16x"]
    assert_places(processor, ours)
    prompt = processor.tokenizer.decode(ours.token_ids)
    assert [f"<image_id>{i}</image_id>" in prompt for i in range(4)] == [True, False, False, True]
    alone = processor([user(large)], downsample_mode="4x", max_slice_nums=2, use_image_id=False)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(ours.views[1:4], alone.views, strict=True))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"downsample_mode": "8x"}, "downsample_mode must be one of 16x, 4x, got '8x'"),
        ({"downsample_mode": 16}, "downsample_mode must be one of 16x, 4x, got 16"),
        ({"max_slice_nums": 0}, "max_slice_nums must be an integer from 1 to 4096, got 0"),
        ({"max_slice_nums": True}, "max_slice_nums must be an integer from 1 to 4096, got True"),
        ({"max_slice_nums": 2.0}, "max_slice_nums must be an integer from 1 to 4096, got 2.0"),
        ({"use_image_id": "no"}, "use_image_id must be True or False, got 'no'"),
        ({"max_num_frames": -1}, "max_num_frames must be an integer from 1 to 65536, got -1"),
        ({"stack_frames": 17}, "stack_frames must be an integer from 1 to 16, got 17"),
    ],
    ids=str,
)
def test_bad_options(processor, overrides, message):
    with pytest.raises(ValueError, match=f"options: {message}"):
        processor([user(text("a"))], **overrides)
    with pytest.raises(ValueError, match=rf"messages\[0\].mm_processor_kwargs: {message}"):
        processor([user(text("a"), mm_processor_kwargs=overrides)])


# ---- bad conversations


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "messages is empty"),
        ("hello", "messages must be a list of messages, got str"),
        ({"role": "user", "content": "a"}, "messages must be a list of messages, got dict"),
        (None, "messages must be a list of messages, got NoneType"),
        (["hello"], r"messages\[0\]: expected a mapping, got str"),
        ([{"content": "a"}], r"messages\[0\]: role must be a string, got None"),
        ([{"role": "assistant", "content": "a"}], r"chat template: (There is no user turn|No user query found in messages)\."),
        (
            [user(text("a")), {"role": "critic", "content": "b"}],
            r"chat template: (A message has an unknown role|Unexpected message role)\.",
        ),
        ([{"role": "user", "content": 3}], r"messages\[0\].content: expected a string or a list of parts, got int"),
        ([user("a")], r"content\[0\]: type must be one of text, image, image_url, video, video_url, got None"),
        ([user({"type": []})], r"content\[0\]: type must be one of .*, got \[\]"),
        ([user({"type": {}})], r"content\[0\]: type must be one of .*, got \{\}"),
        ([user({"type": "x" * 10**6})], r"got 'x{50,99}\.\.\.x{50,99}'\Z"),
        ([user({"type": "audio", "audio": "a.wav"})], r"messages\[0\].content\[0\]: type must be one of .*, got 'audio'"),
        ([user({"type": "text"})], r"content\[0\]: text must be a string, got NoneType"),
        ([user({"type": "image"})], r"content\[0\]: a part of type image needs exactly one of image, url, path, got \[\]"),
        ([user({"type": "image", "url": "a", "path": "b"})], r"needs exactly one of image, url, path, got \['url', 'path'\]"),
        ([user({"type": "image_url", "image_url": {"uri": "a"}})], "image_url.url must be a string, got NoneType"),
        ([user(text("a <|image_pad|>"))], r"content\[0\]: the text contains <\|image_pad\|>, which stands for"),
        ([{"role": "user", "content": "<|video_pad|>"}], r"messages\[0\]: the text contains <\|video_pad\|>"),
        ([user(text("a"), image("/no/such.png"))], r"messages\[0\].content\[1\]: /no/such.png: no such file"),
        ([user(image(b"junk"))], r"content\[0\]: 4 bytes: not an image that Pillow can read"),
        ([user(video(b"junk"))], r"content\[0\]: 4 bytes: not a video, or a broken one"),
        ([user(image("data:image/png;base64,!!"))], r"content\[0\]: data URL: broken base64 of 2 characters"),
        ([user(text("a"), mm_processor_kwargs=3)], r"mm_processor_kwargs: expected a mapping of options, got int"),
        ([user(text("a"), mm_processor_kwargs={"fps": 3})], "unknown option 'fps'; known are max_slice_nums, use_image_id, "),
        ([user(text("a")), {"role": "assistant", "tool_calls": 3}], r"messages\[1\].tool_calls: expected a list of mappings"),
        (
            [user(text("a")), {"role": "assistant", "tool_calls": [{}]}],
            r"tool_calls\[0\]: a tool call needs a function with a name",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_conversations(processor, messages, message):
    with pytest.raises(ValueError, match=message) as caught:
        processor(messages)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("{'a'}", "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "expected a mapping, got list"),
        ('{"a": NaN}', "not valid JSON: NaN is not JSON"),
        ('{"a": 1e999}', "not valid JSON: the number 1e999 is beyond"),
        (r'{"a": "\ud800"}', "not Unicode text: it has half a character"),
        ("[" * 300 + "]" * 300, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_tool_arguments(processor, arguments, message):
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(ValueError, match=rf"messages\[1\].tool_calls\[0\].function.arguments: {message}"):
        processor([user(text("a")), {"role": "assistant", "content": "", "tool_calls": [call]}])


def test_placeholder_in_a_tool_is_refused(processor):
    tool = copy.deepcopy(TOOL)
    tool["function"]["description"] = "<|image_pad|>"
    with pytest.raises(ValueError, match="placeholders for 2 images and 0 videos, the messages have 1 and 0"):
        processor([user(image(picture(50, 50)))], tools=[tool])


def test_bad_tools_and_template_variables(processor):
    messages = [user(text("a"))]
    with pytest.raises(ValueError, match="tools: expected a list of JSON schemas, got dict"):
        processor(messages, tools=TOOL)
    with pytest.raises(ValueError, match="'chat_template' is not a template variable that can be set here"):
        processor(messages, chat_template_kwargs={"chat_template": "{{ 1 }}"})
    with pytest.raises(ValueError, match="chat_template_kwargs: expected a mapping, got list"):
        processor(messages, chat_template_kwargs=["enable_thinking"])
    with pytest.raises(ValueError, match=r"chat template: .*continue_final_message"):
        processor(messages, continue_final_message=True)


# ---- folders


@pytest.mark.parametrize(
    "name, message",
    [
        ("preprocessor_config.json", "no image_processor settings"),
        ("chat_template.jinja", "the tokenizer has no chat template"),
        ("tokenizer.json", "no tokenizer.json"),
    ],
)
def test_missing_file_is_refused(copy_of_demo, name, message):
    (copy_of_demo / name).unlink()
    with pytest.raises(ValueError, match=message):
        Processor.from_folder(copy_of_demo)


def test_bad_folders(copy_of_demo):
    with pytest.raises(ValueError, match="/no/such: no such checkpoint folder"):
        Processor.from_folder("/no/such")
    settings = json.loads((copy_of_demo / "tokenizer_config.json").read_text())
    del settings["extra_special_tokens"]["slice_start_token"]
    (copy_of_demo / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="the tokenizer has no slice_start_token"):
        Processor.from_folder(copy_of_demo)


def test_chat_template_in_tokenizer_config(demo_folder, copy_of_demo):
    template = (copy_of_demo / "chat_template.jinja").read_text()
    settings = json.loads((copy_of_demo / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (copy_of_demo / "tokenizer_config.json").write_text(json.dumps(settings))
    (copy_of_demo / "chat_template.jinja").unlink()
    messages = [user(image(picture(50, 50)), text("a"))]
    inside, beside = (Processor.from_folder(folder)(messages).token_ids for folder in (copy_of_demo, demo_folder))
    assert np.array_equal(inside, beside)


def test_processor_is_thread_safe(processor):
    conversations = [[user(image(picture(100 + 90 * i, 300)), video(CLIP), text(str(i)))] for i in range(6)]
    alone = [processor(messages) for messages in conversations]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(processor, conversations))
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.pixel_values, b.pixel_values)


def test_runs_without_torch_and_imports_no_jax(demo_folder):
    """Runs in a subprocess in which importing torch, torchvision or jax fails."""
    program = f"""
import sys
for name in ("torch", "torchvision", "jax", "flax"):
    sys.modules[name] = None
import numpy as np
from minicpmv46_jax.processing import Processor, Video
clip = Video(np.zeros((4, 30, 40, 3), np.uint8), 2)
parts = [{{"type": "image", "image": np.zeros((500, 500, 3), np.uint8)}}, {{"type": "video", "video": clip}}]
inputs = Processor.from_folder({str(demo_folder)!r})([{{"role": "user", "content": parts}}], stack_frames=2)
print(len(inputs.views), inputs.pixel_values.dtype)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["7", "float32"]
