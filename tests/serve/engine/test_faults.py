"""Injected faults: a fault fails only the requests that it concerns.

All other answers are right, everything is free afterwards, and later requests are answered.
"""

import asyncio
import contextlib
import dataclasses
import threading

import pytest

import serve.engine.engine
from minicpmv46_jax.generation.detokenize import TextStream
from serve.engine import grammar_masks
from serve.engine.engine import Engine
from serve.engine.engine_client import EngineFailed, RequestHandle
from serve.engine.offload import OffloadedPrefix
from serve.engine.prefix_cache import PrefixCache
from serve.engine.request_state import RequestState
from serve.engine.scheduler import Scheduler
from tests.serve.engine.engine_client import generate_ids, run, wait_until
from tests.serve.engine.faults import MESSAGE, Panic, failing, failing_program
from tests.serve.engine.small_engine import FEW_PAGES, make_runner
from tests.serve.engine.workload import (
    LONG_WORDS,
    Letters,
    answers,
    assert_all_free,
    clear_caches,
    fill_prefix_cache,
    make_workload,
    offload_prefix,
)

ALL = None  # the fault may concern any request


@pytest.fixture
def engine(demo_engine):
    return demo_engine


@pytest.fixture(scope="module")
def workload(demo, photos):
    return make_workload(demo, photos)


@pytest.fixture(scope="module")
def expected(demo_engine, workload):
    return answers(demo_engine, workload)


@pytest.fixture(autouse=True)
def everything_is_free(engine):
    yield
    assert_all_free(engine)


def check(engine, workload, expected, found, concerned=ALL):
    """Checks that some of the concerned requests failed and all others are right, then and later.

    `concerned`: names of requests; (): none may fail; ALL: any may, but not all of them.
    """
    failed = {name for name, one in found.items() if isinstance(one, BaseException)}
    assert all(isinstance(found[name], Exception) and MESSAGE in str(found[name]) for name in failed), found
    if concerned is ALL:
        assert failed and len(failed) < len(found)
    else:
        assert failed <= set(concerned) and bool(failed) == bool(concerned), found
    assert all(found[name] == expected[name] for name in found if name not in failed)
    assert_all_free(engine)
    later = {name: workload[name] for name in ("plain", "grammar")}
    assert answers(engine, later) == {name: expected[name] for name in later}


@pytest.fixture
def resets(engine, monkeypatch):
    """A list with an entry for each time that the device's state is made anew."""
    calls, reset = [], engine._runner.reset
    monkeypatch.setattr(engine._runner, "reset", lambda: (calls.append(1), reset()))
    return calls


PROGRAMS = [
    ("prefill", ALL),
    ("sample first", ALL),
    ("decode", ALL),
    ("sample held", ["grammar"]),
    ("record prompt", ["penalties"]),
    ("set bias", ["bias"]),
    ("encode", ["image"]),
]


@pytest.mark.parametrize(("error", "after"), [(MemoryError, False), pytest.param(Panic, True, marks=pytest.mark.full)])
@pytest.mark.parametrize(("program", "concerned"), PROGRAMS)
def test_failing_program_fails_only_its_requests(engine, workload, expected, program, concerned, error, after):
    clear_caches(engine)  # else the image need not be encoded
    with failing_program(engine._runner, program, error, after=after) as fault:
        found = answers(engine, workload)
    assert fault.raised
    check(engine, workload, expected, found, concerned)


@pytest.mark.parametrize("times", [1, 2])
def test_new_state_is_tried_again(engine, workload, expected, monkeypatch, times):
    monkeypatch.setattr(serve.engine.engine, "RESET_PAUSES_S", (0.01, 0.01))
    with (
        failing_program(engine._runner, "decode", after=True),
        failing_program(engine._runner, "empty state", times=times) as fault,
    ):
        found = answers(engine, workload)
    assert fault.calls == times + 1
    check(engine, workload, expected, found)


@pytest.mark.parametrize(
    ("part", "error"), [("offload pages", MemoryError), ("offload state", Panic), ("finish", Panic), ("submit", RuntimeError)]
)
def test_failing_offload_only_loses_the_prefix(demo, engine, workload, expected, resets, part, error):
    clear_caches(engine)
    fill_prefix_cache(demo, engine, LONG_WORDS, engine.snapshots.count)  # the workload evicts these
    if part == "finish":
        injected = failing(OffloadedPrefix, "finish", error, times=100)
    elif part == "submit":
        injected = failing(engine._offload_thread, "submit", error, times=100)
    else:
        injected = failing_program(engine._runner, part, error, times=100)
    with injected as fault:
        found = answers(engine, workload)
        fill_prefix_cache(demo, engine, "x" * 70, engine.snapshots.count)
        wait_until(lambda: all(offload.finished.done() for offload in engine._offloads))
        engine._keep_offloaded()
    assert fault.raised and not resets and not engine.host_cache.used_bytes
    check(engine, workload, expected, found, ())


@pytest.mark.parametrize(
    ("program", "error", "after"),
    [("restore pages", MemoryError, False), ("restore pages", Panic, True), ("restore state", Panic, True)],
)
def test_failing_restore_fails_no_request(demo, engine, workload, expected, program, error, after):
    offload_prefix(demo, engine, workload["long"])
    with failing_program(engine._runner, program, error, after=after) as fault:
        found = answers(engine, workload)
    assert fault.raised
    check(engine, workload, expected, found, ())


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (PrefixCache, "find", Panic),
        (PrefixCache, "add", RuntimeError),
        (Scheduler, "_start_prefill", MemoryError),
        (Scheduler, "_prefill_chunk", Panic),
    ],
)
def test_failing_admission_fails_one_request(engine, workload, expected, owner, name, error):
    clear_caches(engine)  # else no prefix is added
    with failing(owner, name, error, call=2) as fault:
        found = answers(engine, workload)
    assert fault.raised
    assert sum(isinstance(one, Exception) for one in found.values()) == 1
    check(engine, workload, expected, found)


@pytest.mark.parametrize(("name", "call", "error"), [("schedule", 3, Panic), ("finish", 1, RuntimeError)])
def test_failing_scheduler_ends_no_engine(engine, workload, expected, name, call, error):
    with failing(Scheduler, name, error, call=call) as fault:
        found = answers(engine, workload)
    assert fault.raised
    check(engine, workload, expected, {key: one for key, one in found.items() if not isinstance(one, Exception)}, ())


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (RequestState, "add_tokens", RuntimeError),
        (TextStream, "push", Panic),
        (serve.engine.engine, "row_tokens", MemoryError),
        (RequestHandle, "deliver", Panic),
        (RequestState, "__init__", RuntimeError),
        (serve.engine.engine, "prepare_request", Panic),
        (Scheduler, "add", MemoryError),
    ],
)
@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.full)])
def test_host_fault_fails_one_request_and_keeps_all_state(engine, workload, expected, resets, owner, name, error, after):
    with failing(owner, name, error, call=3, after=after) as fault:
        found = answers(engine, workload)
    assert fault.raised and not resets
    assert sum(isinstance(one, Exception) for one in found.values()) == 1
    check(engine, workload, expected, found)


@pytest.mark.parametrize(
    ("part", "error"), [("mask", Panic), ("advance", RuntimeError), ("thread", Panic), ("submit", RuntimeError)]
)
def test_failing_mask_fails_only_its_request(demo, engine, workload, expected, resets, part, error):
    constraint = Letters(demo)
    own = {**workload, "grammar": (workload["grammar"][0], dataclasses.replace(workload["grammar"][1], constraint=constraint))}
    owner, name = {
        "mask": (constraint, "mask"),
        "advance": (constraint, "advance"),
        "thread": (grammar_masks, "_compute_masks"),
        "submit": (engine.masks._pool, "submit"),
    }[part]
    with failing(owner, name, error, call=3) as fault:
        found = answers(engine, own)
    assert fault.raised and not resets
    check(engine, workload, expected, found, ["grammar"])


def test_failing_metrics_fail_nothing_and_are_logged(engine, workload, expected, resets, monkeypatch, caplog):
    clear_caches(engine)  # else no image is encoded
    monkeypatch.setattr(engine.metrics, "_failing", set())
    counters = ("prompt_tokens", "encoded", "late_masks", "host", "steps", "answer_tokens")
    with contextlib.ExitStack() as stack:
        methods = [*((name, "inc") for name in counters), ("requests", "labels")]
        faults = [
            stack.enter_context(failing(getattr(engine.metrics, name), method, Panic, times=10**6)) for name, method in methods
        ]
        found = answers(engine, workload)
    assert all(fault.raised for fault in faults) and not resets
    assert caplog.text.count("a metric cannot be counted") == 7  # once for each method, not for each row
    check(engine, workload, expected, found, ())


@pytest.fixture(scope="module")
def own_runner(demo):
    """A runner for engines that end in the test."""
    return make_runner(demo, FEW_PAGES)


def test_cancelled_preparations_finish_their_requests(demo, own_runner, workload, monkeypatch):
    """`close` cancels preparations that wait for a thread; their readers do not wait for ever."""
    gate, prepare = threading.Event(), serve.engine.engine.prepare_request
    monkeypatch.setattr(serve.engine.engine, "prepare_request", lambda *given: (gate.wait(60), prepare(*given))[1])
    number = serve.engine.engine.PREPARE_THREADS + 2

    async def scenario():
        engine = Engine(demo, own_runner)
        tasks = [asyncio.create_task(generate_ids(engine, *workload["plain"])) for _ in range(number)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(engine.close)
        gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert engine.num_reserved == 0 and engine.failed is None
        return found

    assert [str(error) for error in run(scenario())] == ["the server is shutting down"] * number


@pytest.mark.parametrize("error", [RuntimeError, Panic])
def test_failed_engine_ends_all_requests_with_an_error_of_its_own(demo, own_runner, workload, monkeypatch, caplog, error):
    monkeypatch.setattr(serve.engine.engine, "RESET_PAUSES_S", (0.01,))
    failures = []

    async def scenario(engine):
        engine.on_failure(failures.append)
        tasks = [asyncio.create_task(generate_ids(engine, *one)) for one in [workload["plain"], workload["other"]] * 5]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(type(one) is EngineFailed and "the engine has failed" in str(one) for one in found)
        with pytest.raises(EngineFailed):
            engine.reserve()
        assert engine.num_reserved == 0

    with (
        failing_program(own_runner, "decode"),
        failing_program(own_runner, "empty state", error, times=100),
        Engine(demo, own_runner) as engine,
    ):
        run(scenario(engine))
        wait_until(lambda: not engine._thread.is_alive())
        engine.on_failure(failures.append)  # called at once
    own_runner.reset()
    assert failures == [engine.failed] * 2 and isinstance(engine.failed, error)
    assert not engine.alive and "the engine has failed" in caplog.text
