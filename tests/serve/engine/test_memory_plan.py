"""Planning a device's memory: the plan fits, and reduced settings are reported."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.page_size import PAGE
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.model.state import page_bytes, slot_bytes
from serve.engine.memory_plan import ACCELERATOR, CPU, GIB, EngineConfig, plan_memory, sampling_bytes
from serve.engine.page_pool import num_pages
from tests.released import released_config

TEXT = ModelConfig.from_dict(released_config()).text


def used_bytes(plan, itemsize=2):
    slots = (plan.max_running + plan.num_snapshots) * slot_bytes(TEXT, itemsize) + plan.max_running * sampling_bytes(TEXT)
    return slots + plan.num_pages * page_bytes(TEXT, itemsize) + plan.encoder_cache_rows * TEXT.hidden_size * itemsize


def test_released_models_page_and_slot_bytes():
    assert page_bytes(TEXT, 2) == PAGE * 12 * 2**10
    assert slot_bytes(TEXT, 2) == 18 * 2**20 + 18 * 3 * 6144 * 2


@given(
    gib=st.floats(3, 140),
    running=st.none() | st.integers(1, 2000),
    length=st.none() | st.integers(2, 300_000),
    cache=st.booleans(),
)
def test_plan_fits_into_memory_and_holds_the_longest_request(gib, running, length, cache):
    memory = int(gib * GIB)
    plan, _ = plan_memory(TEXT, 2, memory, EngineConfig(running, length, cache), ACCELERATOR, 128)
    assert used_bytes(plan) <= memory
    assert num_pages(plan.max_model_len) <= plan.num_pages
    assert plan.max_model_len <= min(length or TEXT.max_position_embeddings, TEXT.max_position_embeddings)
    assert 1 <= plan.max_running <= (running or 128)
    assert (plan.num_snapshots > 0) <= cache
    assert plan.decode_rows == tuple(sorted(set(plan.decode_rows))) and plan.decode_rows[-1] == plan.max_running


def test_h200_memory_holds_the_defaults():
    plan, lines = plan_memory(TEXT, 2, 110 * GIB, EngineConfig(), ACCELERATOR, 128)
    assert (plan.max_running, plan.max_model_len, lines) == (128, TEXT.max_position_embeddings, [])
    assert plan.num_pages * PAGE > 4 * TEXT.max_position_embeddings and plan.num_snapshots > 1000


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (EngineConfig(max_running=5000), r"--max-running is 5000, and \d+ fit into the memory: running \d+"),
        (
            EngineConfig(max_model_len=10**6),
            r"--max-model-len is 1000000, and the model's context has 262144 tokens: serving 262144",
        ),
        (EngineConfig(), r"262144 tokens need 4096 pages, and \d+ fit: serving \d+ tokens at most"),
    ],
)
def test_reduced_settings_are_reported(config, line):
    _, lines = plan_memory(TEXT, 2, 3 * GIB, config, ACCELERATOR, 16)
    assert any(re.fullmatch(line, reported) for reported in lines), lines


def test_too_little_memory_is_an_error():
    with pytest.raises(ValueError, match=r"0\.01 GiB are left for the state of conversations"):
        plan_memory(TEXT, 2, GIB // 100, EngineConfig(), CPU, 16)
