"""Random load with random faults: every answer is right, an injected error or cancelled, and nothing leaks.

MINICPMV46_FUZZ multiplies the time, MINICPMV46_SEED repeats a run.
"""

import asyncio
import os
import time

import pytest

import serve.engine.engine
from minicpmv46_jax.generation.detokenize import TextStream
from serve.engine import grammar_masks
from serve.engine.offload import OffloadedPrefix
from serve.engine.prefix_cache import PrefixCache
from serve.engine.request_state import RequestState
from serve.engine.scheduler import Scheduler
from tests.serve.engine.engine_client import request, run, submitted, text
from tests.serve.engine.faults import MESSAGE, Panic, failing, failing_program
from tests.serve.engine.workload import answers, assert_all_free, make_workload

SECONDS = 4 * float(os.environ.get("MINICPMV46_FUZZ") or 1)
MAX_REQUESTS = 12  # at a time; four more than slots
PROGRAMS = ("prefill", "sample first", "decode", "sample held", "record prompt", "set bias", "encode", "empty state",
            "offload pages", "offload state", "restore pages", "restore state")  # fmt: skip
FUNCTIONS = (
    (serve.engine.engine, "prepare_request"),
    (grammar_masks, "_compute_masks"),
    (OffloadedPrefix, "finish"),
    (RequestState, "add_tokens"),
    (TextStream, "push"),
    (PrefixCache, "find"),
    (PrefixCache, "add"),
    (Scheduler, "add"),
    (Scheduler, "schedule"),
    (Scheduler, "_start_prefill"),
    (Scheduler, "_prefill_chunk"),
)


@pytest.fixture(scope="module")
def requests(demo, photos):
    """Requests, among them long prompts that evict one another."""
    more = {f"long {i}": request(demo, text(f"{i} again and again" * 16), max_new_tokens=3) for i in range(6)}
    return {**make_workload(demo, photos), **more}


@pytest.fixture(scope="module")
def expected(demo_engine, requests):
    return answers(demo_engine, requests)


def random_fault(rng, engine):
    """Returns a context in which a random function raises at a random call, once or twice."""
    when = {"error": (RuntimeError, MemoryError, Panic)[rng.integers(3)], "call": int(rng.geometric(0.15))}
    when |= {"times": int(rng.integers(1, 3)), "after": bool(rng.integers(2))}
    at = rng.integers(len(PROGRAMS) + len(FUNCTIONS))
    if at < len(PROGRAMS):
        return failing_program(engine._runner, PROGRAMS[at], **when)
    return failing(*FUNCTIONS[at - len(PROGRAMS)], **when)


async def answer(engine, one, delay_s, num_tokens, salt):
    """Returns a request's tokens; leaves after `num_tokens`, if that is not None."""
    await asyncio.sleep(delay_s)
    tokens = []
    with submitted(engine, *one, salt) as handle:
        async for delta in handle.deltas():
            tokens += [token.id for token in delta.tokens]
            if num_tokens is not None and len(tokens) >= num_tokens:
                break
    return tokens


async def load(engine, rng, requests, names):
    tasks = []
    for name in names:
        leaves = int(rng.integers(6)) if rng.random() < 0.25 else None
        salt = ("", "a")[rng.integers(2)]
        tasks.append((leaves, asyncio.create_task(answer(engine, requests[name], rng.exponential(0.02), leaves, salt))))
    found = await asyncio.gather(*(task for _, task in tasks), return_exceptions=True)
    return [(leaves, one) for (leaves, _), one in zip(tasks, found, strict=True)]


def test_random_load_with_random_faults(demo_engine, requests, expected, rng, monkeypatch):
    monkeypatch.setattr(serve.engine.engine, "RESET_PAUSES_S", (0.01, 0.01))
    end, rounds = time.monotonic() + SECONDS, 0
    while time.monotonic() < end or not rounds:
        names = rng.choice(list(requests), rng.integers(1, MAX_REQUESTS + 1)).tolist()
        with random_fault(rng, demo_engine) as fault:
            found = run(load(demo_engine, rng, requests, names))
        for name, (leaves, one) in zip(names, found, strict=True):
            if isinstance(one, BaseException):
                assert fault.raised and MESSAGE in str(one), (rounds, name, one)
            else:
                right = expected[name]
                assert one == (right if leaves is None else right[: len(one)]), (rounds, name)
        assert_all_free(demo_engine)
        rounds += 1
    assert answers(demo_engine, {"plain": requests["plain"]}) == {"plain": expected["plain"]}
