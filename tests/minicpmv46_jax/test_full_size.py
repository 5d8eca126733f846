"""The released size against transformers; takes minutes, so only `make test-full` runs it.

MINICPMV46_CHECKPOINT names a folder in the released format. Without it, a checkpoint of the released sizes
with random weights is made.
"""

import numpy as np
import pytest
import torch

from minicpmv46_jax import MiniCPMV
from minicpmv46_jax.processing import Video
from tests.oracle import Oracle, assert_same_greedy, our_taps, write_checkpoint
from tests.released import released_config
from tests.tolerances import BFLOAT16_RATIO, FLOAT32_FORWARD, relative_rms

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def cut_folder(tmp_path_factory, demo_folder):
    """A checkpoint of four text and eight vision layers at full width."""
    config = released_config()
    config["text_config"].update(num_hidden_layers=4, layer_types=config["text_config"]["layer_types"][:4])
    config["vision_config"]["num_hidden_layers"] = 8
    return write_checkpoint(tmp_path_factory.mktemp("cut") / "model", config, demo_folder)


@pytest.fixture(scope="module")
def cut_pair(cut_folder):
    return MiniCPMV.from_pretrained(cut_folder, dtype="float32"), Oracle(cut_folder)


@pytest.fixture(scope="module")
def conversations(photos):
    china, flower = photos
    frames = np.random.default_rng(0).integers(0, 256, (4, 90, 120, 3), np.uint8)
    words = {"type": "text", "text": "What is this?"}
    pictures = [{"type": "image", "image": picture} for picture in (china.resize((520, 300)), flower.resize((90, 200)))]
    clip = {"type": "video", "video": Video(frames, fps=2.0)}
    return {
        "text": ([words], {}),
        "thinking": ([words], {"enable_thinking": True}),
        "image": ([pictures[0], words], {"max_slice_nums": 4}),
        "images": ([pictures[0], words, pictures[1]], {"max_slice_nums": 1}),
        "video": ([clip, words], {"max_slice_nums": 1, "stack_frames": 2}),
    }


@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("case", ["text", "thinking", "image", "images", "video"])
def test_full_width_with_fewer_layers(case, mode, cut_pair, conversations):
    ours, oracle = cut_pair
    parts, options = conversations[case]
    inputs = ours.process([{"role": "user", "content": parts}], downsample_mode=mode, **options)
    if case == "video":
        expected, found = {"logits": oracle.logits(inputs)}, {"logits": ours.logits(inputs)}
    else:
        expected, found = oracle.taps(inputs), our_taps(ours, inputs)
    errors = {name: relative_rms(found[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.get)
    print(
        f"\n{case} {mode}: {len(inputs.token_ids)} tokens, logits {errors['logits']:.1e}, worst tap {worst} {errors[worst]:.1e}"
    )
    assert errors[worst] < FLOAT32_FORWARD
    if mode == "16x":
        answer, logits = oracle.greedy(inputs, 64)
        decoding = ours.options(max_new_tokens=64, temperature=0.0, ignore_eos=True)
        tokens = [token.id for token in ours.generator.tokens(inputs, decoding)]
        print(f"{assert_same_greedy(tokens, answer, logits, FLOAT32_FORWARD)} of 64 greedy tokens compared, all of them equal")


@pytest.fixture(scope="module")
def prompts(photos):
    photo = photos[0].resize((1280, 720))
    words = "Why is the sky blue, and the sunset red? Answer in three sentences. " * 4
    return {
        "text": [{"role": "user", "content": words}],
        "1280x720 photo": [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": words}]}],
    }


@pytest.mark.parametrize("case", ["text", "1280x720 photo"])
def test_float32(case, full_size_folder, prompts):
    ours, oracle = MiniCPMV.from_pretrained(full_size_folder, dtype="float32"), Oracle(full_size_folder)
    decoding = {"max_new_tokens": 64, "temperature": 0.0, "ignore_eos": True}
    inputs, options = ours.prepare(prompts[case], decoding)
    expected = oracle.taps(inputs)
    found = our_taps(ours, inputs)
    errors = {name: relative_rms(found[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.get)
    print(f"\n{case}: {len(inputs.token_ids)} tokens, logits {errors['logits']:.1e}, worst tap {worst} {errors[worst]:.1e}")
    assert errors[worst] < FLOAT32_FORWARD
    answer, logits = oracle.greedy(inputs, 64)
    found = [token.id for token in ours.generator.tokens(inputs, options)]
    compared = assert_same_greedy(found, answer, logits, FLOAT32_FORWARD)
    print(f"{case}: {compared} of 64 greedy tokens compared, all of them equal")


@pytest.mark.parametrize("case", ["text", "1280x720 photo"])
def test_bfloat16(case, full_size_folder, prompts):
    ours = MiniCPMV.from_pretrained(full_size_folder, dtype="bfloat16")
    inputs = ours.process(prompts[case])
    found = ours.logits(inputs)
    theirs = Oracle(full_size_folder, torch.bfloat16)
    expected = theirs.logits(inputs)
    truth = Oracle(full_size_folder).logits(inputs)
    error, their_error = relative_rms(found, truth), relative_rms(expected, truth)
    print(f"\n{case}: bfloat16 error {error:.2e}, transformers' own {their_error:.2e}, ratio {error / their_error:.2f}")
    assert error <= BFLOAT16_RATIO * their_error
