"""The whole model against transformers: taps, logits and greedy tokens, both downsample modes, two dtypes."""

import json

import numpy as np
import pytest
import torch

from convert.demo.random_checkpoint import demo_config
from minicpmv46_jax import MiniCPMV
from minicpmv46_jax.processing import Video
from tests.oracle import Oracle, assert_same_greedy, our_taps, write_checkpoint
from tests.tolerances import BFLOAT16_RATIO, FLOAT32_FORWARD, relative_rms
from tests.variants import in_full


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(words):
    return {"type": "text", "text": words}


def image(picture):
    return {"type": "image", "image": picture}


def moving_square(frames=5):
    video = np.zeros((frames, 60, 90, 3), np.uint8)
    for t in range(frames):
        video[t, 10 : 30 + t, 10 * t : 10 * t + 20] = (200, 30 * t, 90)
    return {"type": "video", "video": Video(video, fps=2.0)}


@pytest.fixture(scope="module")
def conversations(photos):
    china, flower = photos
    small = flower.resize((120, 90))
    return {
        "text": (user(text("Why is the sky blue? " * 12)), {}),
        "thinking": (user(text("Prove it.")), {"enable_thinking": True}),
        "image": (user(image(small), text("What is this?")), {"max_slice_nums": 2}),
        "sliced": (user(image(china.resize((520, 300))), text("Where?")), {"max_slice_nums": 4}),
        "images": (user(image(small), text("and"), image(china.resize((64, 200))), text("differ how?")), {"max_slice_nums": 1}),
        "video": (user(moving_square(), text("What moves?")), {"max_slice_nums": 1}),
    }


def variant(**text_fields):
    config = demo_config()
    config["text_config"].update(text_fields)
    return config


# "grouped" has shapes that the released sizes do not: more value heads than key heads, different widths of
# keys and values.
CONFIGS = {
    "demo": variant(),
    "grouped": variant(linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=24, linear_value_head_dim=16),
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory, demo_folder):
    return write_checkpoint(tmp_path_factory.mktemp("parity") / request.param, CONFIGS[request.param], demo_folder)


@pytest.fixture(scope="module")
def ours(folder):
    return MiniCPMV.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def oracle(folder):
    return Oracle(folder)


CASES = ["text", "thinking", "image", "sliced", "images", "video"]


# Each configuration with one mode; the other two pairs only run in `make test-full`.
MODES = pytest.mark.parametrize(
    ("folder", "mode"),
    [
        ("demo", "16x"),
        ("grouped", "4x"),
        *in_full(("demo", "4x"), ("grouped", "16x")),
    ],
    indirect=["folder"],
)


@MODES
@pytest.mark.parametrize("case", CASES)
def test_logits(case, mode, conversations, ours, oracle):
    messages, options = conversations[case]
    inputs = ours.process(messages, downsample_mode=mode, **options)
    assert relative_rms(ours.logits(inputs), oracle.logits(inputs)) < FLOAT32_FORWARD


@MODES
def test_every_tap(mode, conversations, ours, oracle):
    messages, options = conversations["sliced"]
    inputs = ours.process(messages, downsample_mode=mode, **options)
    expected = oracle.taps(inputs)
    found = our_taps(ours, inputs)
    assert set(found) - {"text.embeddings"} == set(expected)
    for name in expected:
        assert relative_rms(found[name], expected[name]) < FLOAT32_FORWARD, name


@pytest.mark.parametrize("case", ["images", "video", *in_full("text")])
def test_64_greedy_tokens(case, conversations, ours, oracle):
    messages, options = conversations[case]
    inputs, decoding = ours.prepare(messages, {**options, "max_new_tokens": 64, "temperature": 0.0, "ignore_eos": True})
    expected, logits = oracle.greedy(inputs, 64)
    found = [token.id for token in ours.generator.tokens(inputs, decoding)]
    assert_same_greedy(found, expected, logits, FLOAT32_FORWARD)


@pytest.mark.parametrize("case", ["image", *in_full("text")])
def test_bfloat16_error_is_at_most_transformers(case, conversations, folder, oracle):
    messages, options = conversations[case]
    ours = MiniCPMV.from_pretrained(folder, dtype="bfloat16")
    inputs = ours.process(messages, **options)
    # The float32 model has the same rounded weights, so that the arithmetic alone is compared.
    rounded = Oracle(folder, torch.bfloat16)
    theirs = rounded.logits(inputs)
    rounded.model.float()
    truth = rounded.logits(inputs)
    assert relative_rms(ours.logits(inputs), truth) <= BFLOAT16_RATIO * relative_rms(theirs, truth)


def test_config_of_save_pretrained_is_read(folder, oracle, tmp_path):
    """transformers' save_pretrained writes more fields to config.json than the released one has."""
    oracle.model.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "merger_times" in written
    from minicpmv46_jax.config import ModelConfig

    assert ModelConfig.from_dict(written) == ModelConfig.from_folder(folder)
