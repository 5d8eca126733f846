"""What fits into a device's memory: nothing is given twice, wishes are cut in words."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv46_jax.config import ModelConfig
from serve.engine.memory_plan import ACCELERATOR, CPU, GIB, EngineConfig, page_bytes, plan_memory, sampling_bytes, slot_bytes
from serve.engine.page_pool import PAGE, pages_of
from tests.released import released_config

TEXT = ModelConfig.from_dict(released_config()).text


def used(sizes, itemsize=2):
    slots = (sizes.running + sizes.snapshots) * slot_bytes(TEXT, itemsize) + sizes.running * sampling_bytes(TEXT)
    return slots + sizes.pages * page_bytes(TEXT, itemsize) + sizes.features * TEXT.hidden_size * itemsize


def test_the_released_models_state_is_what_the_design_says():
    assert page_bytes(TEXT, 2) == PAGE * 12 * 2**10
    assert slot_bytes(TEXT, 2) == 18 * 2**20 + 18 * 3 * 6144 * 2


@given(
    gib=st.floats(3, 140),
    running=st.none() | st.integers(1, 2000),
    longest=st.none() | st.integers(2, 300_000),
    cache=st.booleans(),
)
def test_nothing_is_given_twice_and_the_longest_conversation_fits(gib, running, longest, cache):
    memory = int(gib * GIB)
    sizes, _ = plan_memory(TEXT, 2, memory, EngineConfig(running, longest, cache), ACCELERATOR, 128)
    assert used(sizes) <= memory
    assert pages_of(sizes.longest) <= sizes.pages
    assert sizes.longest <= min(longest or TEXT.max_position_embeddings, TEXT.max_position_embeddings)
    assert 1 <= sizes.running <= (running or 128)
    assert (sizes.snapshots > 0) <= cache
    assert sizes.rows == tuple(sorted(set(sizes.rows))) and sizes.rows[-1] == sizes.running


def test_an_h200_has_room_for_everything():
    sizes, lines = plan_memory(TEXT, 2, 110 * GIB, EngineConfig(), ACCELERATOR, 128)
    assert (sizes.running, sizes.longest, lines) == (128, TEXT.max_position_embeddings, [])
    assert sizes.pages * PAGE > 4 * TEXT.max_position_embeddings and sizes.snapshots > 1000


@pytest.mark.parametrize(
    ("wishes", "line"),
    [
        (EngineConfig(max_running=5000), r"--max-running is 5000, and \d+ fit into the memory: running \d+"),
        (
            EngineConfig(max_model_len=10**6),
            r"--max-model-len is 1000000, and the model's context has 262144 tokens: serving 262144",
        ),
        (EngineConfig(), r"262144 tokens need 4096 pages, and \d+ fit: serving \d+ tokens at most"),
    ],
)
def test_a_wish_that_is_cut_gets_a_line(wishes, line):
    _, lines = plan_memory(TEXT, 2, 3 * GIB, wishes, ACCELERATOR, 16)
    assert any(re.fullmatch(line, said) for said in lines), lines


def test_too_little_memory_is_said():
    with pytest.raises(ValueError, match=r"0\.01 GiB are left for the state of conversations"):
        plan_memory(TEXT, 2, GIB // 100, EngineConfig(), CPU, 16)
