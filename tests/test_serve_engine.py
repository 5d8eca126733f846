"""The engine against a model whose answers are known: order, places, cancelling, faults."""

import asyncio
import threading

import pytest

from minicpmv46_jax.library import Delta
from serve.engine import Cancelled, Engine, EngineFull, EngineStopped
from tests.test_serve_support import PATIENCE_S, FakeModel, prompt

OPTIONS = FakeModel().options()


@pytest.fixture
def model():
    return FakeModel()


def run(scenario):
    """Runs an async scenario; no scenario may hang the suite."""
    return asyncio.run(asyncio.wait_for(scenario, PATIENCE_S))


async def answer(engine, text):
    job = engine.reserve()
    try:
        job.submit(prompt(text), OPTIONS)
        return "".join([delta.text async for delta in job.deltas()])
    finally:
        job.close()


async def started(model, text):
    await asyncio.to_thread(model.wait_for, model.started, text)


async def ended(model, text):
    await asyncio.to_thread(model.wait_for, model.ended, text)


def test_answers_come_whole_and_the_last_step_says_why(model):
    async def scenario():
        job = engine.reserve()
        job.submit(prompt("hello"), OPTIONS)
        deltas = [delta async for delta in job.deltas()]
        assert "".join(delta.text for delta in deltas) == "HELLO"
        assert sum(len(delta.tokens) for delta in deltas) == 5
        assert [delta.finish_reason for delta in deltas][-1] == "stop"
        assert not any(delta.finish_reason for delta in deltas[:-1])

    with Engine(model) as engine:
        run(scenario())


def test_requests_run_in_the_order_of_submission(model):
    model.gate = threading.Semaphore(0)
    texts = [f"request {i}" for i in range(6)]

    async def scenario():
        answers = [asyncio.create_task(answer(engine, text)) for text in texts]
        await started(model, texts[0])
        model.gate.release(1000)
        assert await asyncio.gather(*answers) == [text.upper() for text in texts]
        assert model.started == texts

    with Engine(model) as engine:
        run(scenario())


def test_places_are_bounded_from_reservation_on(model):
    async def scenario():
        jobs = [engine.reserve() for _ in range(3)]
        with pytest.raises(EngineFull, match="3 requests"):
            engine.reserve()
        jobs[0].close()
        jobs[0].close()  # a second time gives nothing back
        engine.reserve()
        with pytest.raises(EngineFull):
            engine.reserve()

    with Engine(model, max_waiting=2) as engine:
        run(scenario())


def test_who_has_read_the_end_of_an_answer_may_ask_again(model):
    async def scenario():
        for i in range(200):
            assert await answer(engine, f"round {i}") == f"ROUND {i}"
        assert engine.taken == 0

    with Engine(model, max_waiting=0) as engine:
        run(scenario())


def test_cancelling_a_running_answer_stops_the_model_at_its_next_step(model):
    model.gate = threading.Semaphore(0)

    async def scenario():
        job = engine.reserve()
        job.submit(prompt("long answer"), OPTIONS)
        deltas = job.deltas()
        model.gate.release()
        assert (await anext(deltas)).text == "L"
        job.close()
        with pytest.raises(Cancelled):
            await anext(deltas)
        model.gate.release()  # one step, and it is told
        await ended(model, "long answer")
        model.gate = None
        assert await answer(engine, "next") == "NEXT"

    with Engine(model, max_waiting=1) as engine:
        run(scenario())


def test_a_cancelled_request_that_waits_gives_its_place_back_and_never_runs(model):
    model.gate = threading.Semaphore(0)

    async def scenario():
        first = asyncio.create_task(answer(engine, "first"))
        await started(model, "first")
        waiting = engine.reserve()
        waiting.submit(prompt("waiting"), OPTIONS)
        assert engine.taken == 2
        waiting.close()
        assert engine.taken == 1
        model.gate.release(1000)
        assert await first == "FIRST"
        assert await answer(engine, "last") == "LAST"
        assert model.started == ["first", "last"]

    with Engine(model, max_waiting=1) as engine:
        run(scenario())


def test_a_request_cancelled_while_it_was_prepared_is_not_submitted(model):
    async def scenario():
        job = engine.reserve()
        job.cancel()
        assert engine.taken == 1  # held until its preparation has ended
        with pytest.raises(Cancelled):
            job.submit(prompt("hello"), OPTIONS)
        job.close()
        assert engine.taken == 0

    with Engine(model) as engine:
        run(scenario())
    assert model.started == []


def test_a_fault_is_its_own_requests_alone(model):
    async def scenario():
        model.fault = RuntimeError("device on fire")
        with pytest.raises(RuntimeError, match="device on fire"):
            await answer(engine, "hello")
        model.fault = None
        assert await answer(engine, "hello") == "HELLO"
        assert engine.taken == 0

    with Engine(model) as engine:
        run(scenario())


def test_an_answer_without_an_end_is_a_fault(model):
    model.generate = lambda inputs, options: (delta for delta in [Delta("A", ())])

    async def scenario():
        with pytest.raises(RuntimeError, match="without a finish_reason"):
            await answer(engine, "hello")

    with Engine(model) as engine:
        run(scenario())


def test_a_reader_that_does_not_read_holds_up_nobody(model):
    text = "slow" * 40

    async def scenario():
        slow = engine.reserve()
        slow.submit(prompt(text), OPTIONS)
        await ended(model, text)
        assert await answer(engine, "quick") == "QUICK"
        assert "".join([delta.text async for delta in slow.deltas()]) == text.upper()

    with Engine(model, max_waiting=0) as engine:  # the slow one's place is free as soon as the model is
        run(scenario())


def test_closing_the_engine_ends_what_runs_and_what_waits(model):
    model.gate = threading.Semaphore(0)

    async def scenario():
        answers = [asyncio.create_task(answer(engine, text)) for text in ("running", "waiting")]
        await started(model, "running")
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        with pytest.raises(EngineStopped):
            await answers[1]
        model.gate.release()
        with pytest.raises(EngineStopped):
            await answers[0]
        await closing
        assert not engine.alive
        with pytest.raises(EngineStopped):
            engine.reserve()

    engine = Engine(model)
    run(scenario())
    assert model.started == ["running"]
    assert "engine" not in [thread.name for thread in threading.enumerate()]
