"""The full-size model, once, against transformers: minutes long, so behind `make test-full`.

MINICPMV46_CHECKPOINT names a folder in the released format; without it, one of the released sizes is made with random weights.
"""

import os
from pathlib import Path

import pytest
import torch

from minicpmv46_jax import MiniCPMV
from tests.oracle import Oracle, assert_same_greedy, our_taps, write_checkpoint
from tests.released import released_config
from tests.tolerances import BFLOAT16_RATIO, FLOAT32_FORWARD, relative_rms

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_folder):
    if given := os.environ.get("MINICPMV46_CHECKPOINT"):
        return Path(given)
    return write_checkpoint(tmp_path_factory.mktemp("full") / "model", released_config(), demo_folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def prompts(photos):
    photo = photos[0].resize((1280, 720))
    words = "Why is the sky blue, and the sunset red? Answer in three sentences. " * 4
    return {
        "text": [{"role": "user", "content": words}],
        "1280x720 photo": [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": words}]}],
    }


@pytest.mark.parametrize("case", ["text", "1280x720 photo"])
def test_float32(case, folder, prompts):
    ours, oracle = MiniCPMV.from_pretrained(folder, dtype="float32"), Oracle(folder)
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
def test_bfloat16(case, folder, prompts):
    ours = MiniCPMV.from_pretrained(folder, dtype="bfloat16")
    inputs = ours.process(prompts[case])
    found = ours.logits(inputs)
    theirs = Oracle(folder, torch.bfloat16)
    expected = theirs.logits(inputs)
    truth = Oracle(folder).logits(inputs)
    error, their_error = relative_rms(found, truth), relative_rms(expected, truth)
    print(f"\n{case}: bfloat16 error {error:.2e}, transformers' own {their_error:.2e}, ratio {error / their_error:.2f}")
    assert error <= BFLOAT16_RATIO * their_error
