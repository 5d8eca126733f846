"""The engine over the small model: every answer is the one its request has alone, whatever else runs; and what happens when
things go wrong."""

import asyncio
import contextlib
import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import serve.engine.engine
from minicpmv46_jax.config import GenerationConfig
from minicpmv46_jax.generation.options import generation_options
from minicpmv46_jax.model.state import KeyValues
from minicpmv46_jax.processing import Inputs, Video
from serve.engine.engine import Engine
from serve.engine.engine_client import Cancelled, EngineFull, EngineStopped, RequestRejected
from serve.engine.model_runner import Copy, ModelRunner
from serve.engine.page_pool import PAGE
from serve.engine.request import prepare
from tests.serve.engine.engine_client import GREEDY, ask, request, run, submitted, text, wait_until
from tests.serve.engine.small_engine import BUCKETS, FEW_PAGES, SIZES, device_of

GREEDY_OPTIONS = generation_options(GenerationConfig())


@pytest.fixture
def engine(demo_engine):
    return demo_engine


@pytest.fixture(scope="module")
def alone(demo):
    """A request's answer from the plain generator."""

    def answer(inputs, options):
        tokens = list(demo.generator.tokens(inputs, options))
        return [token.id for token in tokens if token.id not in options.stop_token_ids]

    return answer


@pytest.fixture(autouse=True)
def nothing_is_held(engine):
    """After each test."""
    yield
    wait_until(lambda: engine.num_reserved == 0)
    assert engine.slots.free == engine.slots.count
    assert not engine.scheduler.waiting and not engine.scheduler.reading
    kept = len(engine.prefixes._nodes)
    assert engine.pages.free == engine.pages.count - kept
    assert engine.snapshots.free == engine.snapshots.count - engine.prefixes.snapshots
    assert all(not entry.pins for entry in engine.features._entries.values())


@pytest.fixture(scope="module")
def mixed(demo, photos):
    """Text, pictures in both modes, a video; greedy, with stops and with seeds."""
    china, flower = ({"type": "image", "image": photo} for photo in (photos[0].resize((520, 300)), photos[1].resize((120, 90))))
    frames = np.random.default_rng(0).integers(0, 256, (3, 60, 90, 3), np.uint8)
    video = {"type": "video", "video": Video(frames, fps=2.0)}
    return [
        request(demo, text("Why is the sky blue? " * 30), max_new_tokens=40),
        request(demo, text("Hi")),
        request(demo, flower, text("What?"), max_slice_nums=1),
        request(demo, text("and " * 20), china, text("where?"), max_slice_nums=4),
        request(demo, flower, text("or"), flower, text("4x"), max_slice_nums=1, downsample_mode="4x"),
        request(demo, video, text("What moves?"), max_slice_nums=1),
        request(demo, text("Sample this."), temperature=0.9, top_p=0.9, seed=7),
        request(demo, text("Repeat, repeat, repeat."), repetition_penalty=1.3, frequency_penalty=0.5),
        request(demo, text("x" * 700), max_new_tokens=9),
        request(demo, text("y" * 300), max_new_tokens=1),
    ]


@pytest.fixture(scope="module")
def expected(mixed, alone):
    return [alone(*one) for one in mixed]


def test_many_together_answer_as_each_alone(engine, mixed, expected):
    async def scenario():
        return await asyncio.gather(*(ask(engine, *one) for one in mixed * 2))

    compiled = engine.compilations.count
    for (tokens, reason), right in zip(run(scenario()), expected * 2, strict=True):
        assert tokens == right and reason == "length"
    assert engine.compilations.count == compiled


def test_preempted_answers_go_on_as_if_nothing_had_been(demo, tight_engine, mixed, expected, alone):
    """19 pages for answers that want 3 to 13 each."""
    long = [request(demo, text(f"{i} " * 60), max_new_tokens=260) for i in range(4)]

    async def scenario():
        return await asyncio.gather(*(ask(tight_engine, *one) for one in [*long, *mixed]))

    preemptions = tight_engine.scheduler.preemptions
    answers = run(scenario())
    assert tight_engine.scheduler.preemptions > preemptions and tight_engine.pages.free == tight_engine.pages.count
    for (tokens, _), right in zip(answers, [*(alone(*one) for one in long), *expected], strict=True):
        assert tokens == right


def test_a_conversation_starts_from_its_last_turn(demo, engine, photos, alone):
    picture = {"type": "image", "image": photos[0].resize((300, 200))}
    messages = [{"role": "user", "content": [picture, text("Describe it at length, please. " * 6)]}]
    for turn in range(3):
        inputs, options = demo.prepare(messages, {**GREEDY, "max_new_tokens": 30, "max_slice_nums": 1})
        before, encoded = engine.scheduler.cached_tokens, engine.features.misses
        tokens, _ = run(ask(engine, inputs, options))
        assert tokens == alone(inputs, options)
        hit = engine.scheduler.cached_tokens - before
        assert (hit > inputs.views[0].num_tokens) == (turn > 0)
        assert engine.features.misses == encoded + (turn == 0)
        messages += [{"role": "assistant", "content": "It is a temple."}, {"role": "user", "content": f"And {turn}? " * 20}]


def test_another_picture_is_another_prefix(demo, engine, photos, alone):
    for photo in photos:
        one = request(demo, {"type": "image", "image": photo.resize((200, 200))}, text("same words " * 20), max_slice_nums=1)
        assert run(ask(engine, *one))[0] == alone(*one)


def test_a_restored_memory_is_the_cold_runs_to_the_bit(demo, engine):
    inputs, options = request(demo, text("z" * 640), max_new_tokens=1)
    run(ask(engine, inputs, options))
    cold = engine.prefixes.find(_keys(inputs))
    state = engine._device._decoding.state
    slots = {layer.recurrent_state[cold.node.snapshot].tobytes() for layer in _delta(state)}
    longer = Inputs(np.concatenate([inputs.token_ids, np.arange(100, dtype=np.int32)]), ())
    before = engine.scheduler.cached_tokens
    run(ask(engine, longer, options))
    assert engine.scheduler.cached_tokens - before == cold.blocks * PAGE == len(inputs.token_ids) // PAGE * PAGE
    state = engine._device._decoding.state
    assert {layer.recurrent_state[cold.node.snapshot].tobytes() for layer in _delta(state)} == slots


def test_what_left_the_device_comes_back_to_the_bit(demo, engine, photos, alone):
    """Eight other prompts push the first out; from host memory it gives the same answer without being read again."""
    picture = {"type": "image", "image": photos[0].resize((100, 100))}
    first = request(demo, picture, text("remember " * 40), max_slice_nums=1)
    assert run(ask(engine, *first))[0] == alone(*first)
    keys = _keys(first[0])
    node = engine.prefixes.find(keys).node
    cold = [layer.recurrent_state[node.snapshot].tobytes() for layer in _delta(engine._device._decoding.state)]
    for i in range(SIZES.snapshots):
        run(ask(engine, *request(demo, text(f"{i}" * 200), max_new_tokens=1)))
    assert engine.prefixes.find(keys).blocks == 0
    before = engine.scheduler.restored_tokens
    assert run(ask(engine, *first))[0] == alone(*first)
    restored = engine.prefixes.find(keys)
    assert engine.scheduler.restored_tokens - before == restored.blocks * PAGE > first[0].views[0].num_tokens
    state = engine._device._decoding.state
    assert [layer.recurrent_state[restored.node.snapshot].tobytes() for layer in _delta(state)] == cold


def test_prefixes_do_not_wait_for_those_that_leave(demo, engine, monkeypatch):
    """More leave than the host takes up: those go for good, and nobody waits for them."""
    landing, landed = threading.Event(), []
    land = Copy.land

    def slow(copy):
        assert landing.wait(60)
        land(copy)
        landed.append(copy)

    monkeypatch.setattr(Copy, "land", slow)
    monkeypatch.setattr(serve.engine.engine, "MOST_LANDING", 2)
    for i in range(SIZES.snapshots + 4):
        run(ask(engine, *request(demo, text(f"{i}!" * 200), max_new_tokens=1)))
    landing.set()
    wait_until(lambda: all(copying.done() for copying in engine._landing))
    assert len(landed) == 2


def test_what_is_soon_read_again_is_not_copied(demo, engine, monkeypatch):
    """Prefixes that one step reads leave the device for good."""
    copied, fetch = [], ModelRunner.fetch

    def noted(device, pages, slot):
        copied.append(len(pages) * PAGE)
        return fetch(device, pages, slot)

    monkeypatch.setattr(ModelRunner, "fetch", noted)
    prompts = [request(demo, text(f"{i}?" * 50), max_new_tokens=1) for i in range(SIZES.snapshots * 2)]
    for inputs, options in prompts:
        assert PAGE < len(inputs.token_ids) < BUCKETS.prompts[-1][0]
        run(ask(engine, inputs, options))
    assert engine.prefixes.find(_keys(prompts[-1][0])).blocks and not engine.prefixes.find(_keys(prompts[0][0])).blocks
    assert all(tokens >= BUCKETS.prompts[-1][0] for tokens in copied)  # those that were there before


@pytest.fixture(scope="module")
def device(demo):
    return device_of(demo, SIZES)


@pytest.mark.parametrize("pages, first", [(3, 0), (8, 3), (20, 9), (75, 40)])
def test_a_prefix_of_any_length_goes_to_the_host_and_back(device, pages, first):
    """Into other pages and another slot, those before `first` left alone; and nothing else is touched."""
    dice = np.random.default_rng()
    fill = lambda x: jnp.asarray(dice.standard_normal(x.shape), x.dtype)  # noqa: E731
    layers = tuple(jax.tree.map(fill, layer) for layer in device._decoding.state.layers)
    before = jax.tree.map(np.asarray, layers)
    state = dataclasses.replace(device._decoding.state, layers=layers)
    device._decoding = dataclasses.replace(device._decoding, state=state)
    places = dice.permutation(SIZES.pages)
    source, to = places[:pages], places[pages : 2 * pages - first]
    copy = device.fetch(source.tolist(), 5)
    copy.land()
    device.store(copy, first, to.tolist(), 2)
    for old, new in zip(before, device._decoding.state.layers, strict=True):
        wanted = jax.tree.map(np.copy, old)
        for x, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(old), strict=True):
            if isinstance(old, KeyValues):
                x[to] = y[source[first:]]
            else:
                x[2] = y[5]
        assert jax.tree.all(jax.tree.map(np.array_equal, wanted, new))


def _keys(inputs):
    return prepare(inputs, GREEDY_OPTIONS, 70).keys


def _delta(state):
    return [layer for layer in state.layers if hasattr(layer, "memory")]


def test_answers_end_where_they_should(demo, engine, alone):
    inputs, options = request(demo, text("Count."), max_new_tokens=30)
    free = alone(inputs, options)
    stop = next(i for i in free[5:] if i not in free[:5])
    stopped = demo.options(**GREEDY, max_new_tokens=30, stop_token_ids=[stop])
    tokens, reason = run(ask(engine, inputs, stopped))
    assert (tokens, reason) == (free[: free.index(stop)], "stop")
    many = [i for i in range(stop) if i not in free][:30] + [stop]  # more than the device looks out for
    assert run(ask(engine, inputs, demo.options(**GREEDY, max_new_tokens=30, stop_token_ids=many)))[0] == tokens
    whole = demo.detokenizer.decode(free)
    words = demo.options(**GREEDY, max_new_tokens=30, stop=[whole[4:6]])

    async def texts():
        with submitted(engine, inputs, words) as job:
            return "".join([delta.text async for delta in job.deltas()])

    assert run(texts()) == whole[: whole.find(whole[4:6])]


def test_the_context_ends_an_answer(demo, engine):
    inputs = Inputs(np.full(SIZES.longest - 5, 65, np.int32), ())
    tokens, reason = run(ask(engine, inputs, demo.options(**GREEDY)))
    assert (len(tokens), reason) == (5, "length")


def test_logprobs_are_the_generators(demo, engine):
    inputs, options = request(demo, text("Log."), logprobs=3, max_new_tokens=6)
    right = list(demo.generator.tokens(inputs, options))

    async def scenario():
        with submitted(engine, inputs, options) as job:
            return [token async for delta in job.deltas() for token in delta.tokens]

    for token, other in zip(run(scenario()), right, strict=True):
        assert token.id == other.id and [i for i, _ in token.top] == [i for i, _ in other.top]
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_stream_comes_while_it_is_made_and_cancelling_frees_its_slot(demo, engine):
    inputs, options = request(demo, text("long"), max_new_tokens=1500)

    async def scenario():
        with submitted(engine, inputs, options) as job:
            deltas = job.deltas()
            assert (await anext(deltas)).tokens
            job.close()
            with pytest.raises(Cancelled):
                await anext(deltas)
        while engine.slots.free < SIZES.running:
            await asyncio.sleep(0.01)
        assert engine.scheduler.running == 0

    run(scenario())


def test_a_request_cancelled_while_it_was_prepared_is_not_submitted(demo, engine):
    async def scenario():
        job = engine.reserve()
        job.cancel()
        assert engine.num_reserved == 1  # held until its preparation has ended
        with pytest.raises(Cancelled):
            job.submit(*request(demo, text("hello")))
        job.close()
        job.close()  # a second time gives nothing back
        assert engine.num_reserved == 0

    run(scenario())


def test_places_are_bounded_from_reservation_on(demo, engine):
    async def scenario():
        jobs = [engine.reserve() for _ in range(engine.capacity)]
        with pytest.raises(EngineFull, match=f"{engine.capacity} requests"):
            engine.reserve()
        for job in jobs:
            job.close()

    run(scenario())


def test_a_reader_that_does_not_read_holds_up_nobody(demo, engine, alone):
    slow, quick = request(demo, text("slow"), max_new_tokens=100), request(demo, text("quick"))

    async def scenario():
        with submitted(engine, *slow) as job:
            await ask(engine, *quick)
            while engine.num_reserved:
                await asyncio.sleep(0.01)
            return [token.id async for delta in job.deltas() for token in delta.tokens]

    assert run(scenario()) == alone(*slow)


@pytest.mark.parametrize(("step", "call"), [("read", 3), ("decode", 3), ("encode", 1), ("store", 1)])
def test_a_step_that_fails_is_its_own_requests_alone(demo, engine, mixed, expected, monkeypatch, caplog, step, call):
    original, calls = getattr(engine._device, step), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise RuntimeError("device on fire")
        return original(*arguments)

    async def scenario():
        return await asyncio.gather(*(ask(engine, *one) for one in mixed), return_exceptions=True)

    if step == "encode":
        forget(engine)
    if step == "store":  # the long prompt leaves for the host, and is asked for again
        run(ask(engine, *mixed[0]))
        for i in range(SIZES.snapshots):
            run(ask(engine, *request(demo, text(f"{i}" * 200), max_new_tokens=1)))
    monkeypatch.setattr(engine._device, step, failing)
    answers = run(scenario())
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    assert failed and {str(error) for error in failed} == {"device on fire"}
    assert len(failed) < len(mixed)
    for answer, right in zip(answers, expected, strict=True):
        assert isinstance(answer, RuntimeError) or answer[0] == right
    assert "device on fire" in caplog.text
    assert [run(ask(engine, *one))[0] for one in mixed[:3]] == expected[:3]


def forget(engine):
    """What an idle engine has kept of earlier requests."""
    engine.prefixes.clear()
    engine.host.clear()
    engine.features.clear()


def test_results_that_cannot_be_fetched_fail_their_requests(demo, engine, mixed, expected, monkeypatch):
    original, calls = engine._device.decode, []

    def broken(plan, mode):
        calls.append(original(plan, mode))
        return object() if len(calls) == 4 else calls[-1]

    monkeypatch.setattr(engine._device, "decode", broken)
    with pytest.raises((AttributeError, TypeError)):
        run(ask(engine, *mixed[0]))
    assert run(ask(engine, *mixed[0]))[0] == expected[0]


def test_who_waits_too_long_is_told(demo, engine, monkeypatch):
    async def scenario():
        with contextlib.ExitStack() as cleanup:
            for i in range(SIZES.running):
                long = request(demo, text(f"first {i}"), max_new_tokens=1900)
                await anext(cleanup.enter_context(submitted(engine, *long)).deltas())
            monkeypatch.setattr(engine, "policy", dataclasses.replace(engine.policy, max_wait_s=0.1))
            with pytest.raises(EngineFull, match=r"waited 0.1 seconds"):
                await ask(engine, *request(demo, text("second")))

    run(scenario())


def test_stopping_ends_what_runs_and_what_waits(demo):
    long = request(demo, text("long"), max_new_tokens=900)

    async def scenario():
        tasks = [asyncio.create_task(ask(engine, *long)) for _ in range(FEW_PAGES.running + 1)]
        while not engine.scheduler.running or not engine.scheduler.waiting:
            await asyncio.sleep(0.01)
        engine.stop()
        for task in tasks:
            with pytest.raises(EngineStopped):
                await task
        assert not engine.alive
        with pytest.raises(EngineStopped):
            engine.reserve()

    with Engine(demo, device_of(demo, FEW_PAGES)) as engine:
        run(scenario())


def test_what_cannot_be_served_is_refused_at_once(demo, engine, photos):
    slim = {"type": "image", "image": photos[0].resize((3000, 10))}

    async def refused(*parts, **options):
        job = engine.reserve()
        with contextlib.closing(job), pytest.raises(RequestRejected) as caught:
            job.submit(*request(demo, *parts, **options))
        return str(caught.value)

    said = run(refused(text("x" * 2100)))
    assert "the prompt has 21" in said and "this server holds 2048" in said
    assert "patches, and this server encodes 1152 at most" in run(refused(slim, max_slice_nums=1))
    assert engine.num_reserved == 0


def test_rounds_of_many_streams_with_some_that_leave(demo, engine, mixed, expected):
    """32 at a time, each third leaves in the middle; what is held is the same after each round."""
    rng = np.random.default_rng(0)

    async def one(i):
        inputs, options = mixed[i % len(mixed)]
        with submitted(engine, inputs, options) as job:
            tokens, leaves = [], rng.integers(1, 8) if i % 3 == 0 else None
            async for delta in job.deltas():
                tokens += [token.id for token in delta.tokens]
                if leaves is not None and len(tokens) >= leaves:
                    return tokens == expected[i % len(mixed)][: len(tokens)]
        return tokens == expected[i % len(mixed)]

    async def scenario():
        gate = asyncio.Semaphore(32)

        async def gated(i):
            async with gate:
                return await one(i)

        return await asyncio.gather(*(gated(i) for i in range(40)))

    compiled = engine.compilations.count
    for _ in range(2):
        assert all(run(scenario()))
        wait_until(lambda: engine.num_reserved == 0)
        assert engine.slots.free == SIZES.running
    assert engine.compilations.count == compiled


def test_metrics_tell_what_happened(demo, engine):
    run(ask(engine, *request(demo, text("metrics"), max_new_tokens=5)))
    lines = dict(line.rsplit(" ", 1) for line in engine.metrics.text().decode().splitlines() if not line.startswith("#"))
    numbers = {name.removeprefix("minicpmv46_"): float(value) for name, value in lines.items()}
    assert numbers["running"] == numbers["waiting"] == numbers["reading"] == numbers["places_taken"] == 0
    assert numbers["slots_free"] == numbers["slots_total"] == SIZES.running
    assert numbers['requests_total{outcome="length"}'] > 0 and numbers['requests_total{outcome="cancelled"}'] > 0
    assert 0 < numbers["prefix_hit_tokens_total"] < numbers["read_tokens_total"]
    assert numbers["feature_hits_total"] > 0 and numbers["feature_misses_total"] > 0
    assert numbers["time_to_first_token_seconds_count"] > 0 and numbers["time_per_output_token_seconds_count"] > 0
    assert numbers["answer_tokens_total"] > numbers["time_to_first_token_seconds_count"]
    assert numbers["host_seconds_total"] > 0 and numbers["steps_total"] > 0
    assert numbers["compilations_total"] == engine.compilations.count
