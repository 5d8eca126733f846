"""The engine over the demo model: every output equals that of its request alone, whatever else runs; and
recovery from errors.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import serve.engine.engine
from kernels_pallas.page_size import PAGE
from minicpmv46_jax.config import GenerationConfig
from minicpmv46_jax.generation.options import generation_options
from minicpmv46_jax.model.attention import KeyValues
from minicpmv46_jax.model.gated_delta_net import GatedDeltaState
from minicpmv46_jax.processing import Inputs, Video
from serve.engine.engine import Engine
from serve.engine.engine_client import Cancelled, EngineFull, EngineStopped, RequestRejected
from serve.engine.model_runner import ModelRunner
from serve.engine.offload import OffloadedPrefix
from serve.engine.request import prepare_request
from tests.serve.engine.engine_client import GREEDY, generate_ids, request, run, submitted, text, wait_until
from tests.serve.engine.small_engine import BUCKETS, FEW_PAGES, SMALL_PLAN, make_runner
from tests.serve.engine.workload import assert_all_free, clear_caches

GREEDY_OPTIONS = generation_options(GenerationConfig())


@pytest.fixture
def engine(demo_engine):
    return demo_engine


@pytest.fixture(scope="module")
def alone(demo):
    """Returns a request's output from the plain generator."""

    def generate(inputs, options):
        tokens = list(demo.generator.tokens(inputs, options))
        return [token.id for token in tokens if token.id not in options.stop_token_ids]

    return generate


@pytest.fixture(autouse=True)
def everything_is_free(engine):
    """Checks the engine after each test."""
    yield
    assert_all_free(engine)


@pytest.fixture(scope="module")
def mixed(demo, photos):
    """Text, images in both modes, a video; greedy, with penalties and with seeds."""
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


def test_batched_outputs_equal_single_outputs(engine, mixed, expected):
    async def scenario():
        return await asyncio.gather(*(generate_ids(engine, *one) for one in mixed * 2))

    compiled = engine.compilations.count
    for (tokens, reason), right in zip(run(scenario()), expected * 2, strict=True):
        assert tokens == right and reason == "length"
    assert engine.compilations.count == compiled


def test_preempted_requests_resume_with_the_same_output(demo, tight_engine, mixed, expected, alone):
    """19 pages for requests that need 3 to 13 each."""
    long = [request(demo, text(f"{i} " * 60), max_new_tokens=260) for i in range(4)]

    async def scenario():
        return await asyncio.gather(*(generate_ids(tight_engine, *one) for one in [*long, *mixed]))

    preemptions = tight_engine.scheduler.preemptions
    answers = run(scenario())
    assert tight_engine.scheduler.preemptions > preemptions and tight_engine.pages.num_free == tight_engine.pages.count
    for (tokens, _), right in zip(answers, [*(alone(*one) for one in long), *expected], strict=True):
        assert tokens == right


def test_a_conversation_starts_from_its_last_turn(demo, engine, photos, alone):
    picture = {"type": "image", "image": photos[0].resize((300, 200))}
    messages = [{"role": "user", "content": [picture, text("Describe it at length, please. " * 6)]}]
    for turn in range(3):
        inputs, options = demo.prepare(messages, {**GREEDY, "max_new_tokens": 30, "max_slice_nums": 1})
        before, encoded = engine.scheduler.cached_tokens, engine.encoder_cache.misses
        tokens, _ = run(generate_ids(engine, inputs, options))
        assert tokens == alone(inputs, options)
        hit = engine.scheduler.cached_tokens - before
        assert (hit > inputs.views[0].num_tokens) == (turn > 0)
        assert engine.encoder_cache.misses == encoded + (turn == 0)
        messages += [{"role": "assistant", "content": "It is a temple."}, {"role": "user", "content": f"And {turn}? " * 20}]


def test_different_images_do_not_share_a_prefix(demo, engine, photos, alone):
    for photo in photos:
        one = request(demo, {"type": "image", "image": photo.resize((200, 200))}, text("same words " * 20), max_slice_nums=1)
        assert run(generate_ids(engine, *one))[0] == alone(*one)


def test_snapshot_is_bitwise_equal_after_reuse(demo, engine):
    inputs, options = request(demo, text("z" * 640), max_new_tokens=1)
    run(generate_ids(engine, inputs, options))
    cold = engine.prefix_cache.find(_block_hashes(inputs))
    state = engine._runner._decode_state.state
    slots = {layer.recurrent_state[cold.node.snapshot_slot].tobytes() for layer in _gated_delta_layers(state)}
    longer = Inputs(np.concatenate([inputs.token_ids, np.arange(100, dtype=np.int32)]), ())
    before = engine.scheduler.cached_tokens
    run(generate_ids(engine, longer, options))
    assert engine.scheduler.cached_tokens - before == cold.num_blocks * PAGE == len(inputs.token_ids) // PAGE * PAGE
    state = engine._runner._decode_state.state
    assert {layer.recurrent_state[cold.node.snapshot_slot].tobytes() for layer in _gated_delta_layers(state)} == slots


def test_restored_prefix_is_bitwise_equal(demo, engine, photos, alone):
    """Eight other prompts evict the first; restored from host memory it gives the same output without a new
    prefill.
    """
    picture = {"type": "image", "image": photos[0].resize((100, 100))}
    first = request(demo, picture, text("remember " * 40), max_slice_nums=1)
    assert run(generate_ids(engine, *first))[0] == alone(*first)
    keys = _block_hashes(first[0])
    node = engine.prefix_cache.find(keys).node
    cold = [
        layer.recurrent_state[node.snapshot_slot].tobytes() for layer in _gated_delta_layers(engine._runner._decode_state.state)
    ]
    for i in range(SMALL_PLAN.num_snapshots):
        run(generate_ids(engine, *request(demo, text(f"{i}" * 200), max_new_tokens=1)))
    assert engine.prefix_cache.find(keys).num_blocks == 0
    before = engine.scheduler.restored_tokens
    assert run(generate_ids(engine, *first))[0] == alone(*first)
    restored = engine.prefix_cache.find(keys)
    assert engine.scheduler.restored_tokens - before == restored.num_blocks * PAGE > first[0].views[0].num_tokens
    state = engine._runner._decode_state.state
    assert [layer.recurrent_state[restored.node.snapshot_slot].tobytes() for layer in _gated_delta_layers(state)] == cold


def test_eviction_does_not_wait_for_slow_offloads(demo, engine, monkeypatch):
    """Prefixes beyond MAX_OFFLOADS are dropped without waiting."""
    gate, finished = threading.Event(), []
    finish = OffloadedPrefix.finish

    def slow(prefix):
        assert gate.wait(60)
        finish(prefix)
        finished.append(prefix)

    monkeypatch.setattr(OffloadedPrefix, "finish", slow)
    monkeypatch.setattr(serve.engine.engine, "MAX_OFFLOADS", 2)
    for i in range(SMALL_PLAN.num_snapshots + 4):
        run(generate_ids(engine, *request(demo, text(f"{i}!" * 200), max_new_tokens=1)))
    gate.set()
    wait_until(lambda: all(offload.finished.done() for offload in engine._offloads))
    assert len(finished) == 2


def test_short_prefixes_are_not_offloaded(demo, engine, monkeypatch):
    """Prefixes that one step can prefill are dropped."""
    copied, offload = [], ModelRunner.offload

    def watched(runner, pages, slot):
        copied.append(len(pages) * PAGE)
        return offload(runner, pages, slot)

    monkeypatch.setattr(ModelRunner, "offload", watched)
    prompts = [request(demo, text(f"{i}?" * 50), max_new_tokens=1) for i in range(SMALL_PLAN.num_snapshots * 2)]
    for inputs, options in prompts:
        assert PAGE < len(inputs.token_ids) < BUCKETS.prefill_shapes[-1][0]
        run(generate_ids(engine, inputs, options))
    assert (
        engine.prefix_cache.find(_block_hashes(prompts[-1][0])).num_blocks
        and not engine.prefix_cache.find(_block_hashes(prompts[0][0])).num_blocks
    )
    assert all(tokens >= BUCKETS.prefill_shapes[-1][0] for tokens in copied)  # of earlier tests


@pytest.fixture(scope="module")
def runner(demo):
    return make_runner(demo, SMALL_PLAN)


@pytest.mark.parametrize("pages, first", [(3, 0), (8, 3), (20, 9), (75, 40)])
def test_prefix_of_any_length_is_offloaded_and_restored(runner, pages, first):
    """Restores into other pages and another slot, skips pages before `first`, and changes nothing else."""
    dice = np.random.default_rng()
    fill = lambda x: jnp.asarray(dice.standard_normal(x.shape), x.dtype)  # noqa: E731
    layers = tuple(jax.tree.map(fill, layer) for layer in runner._decode_state.state.layers)
    before = jax.tree.map(np.asarray, layers)
    state = dataclasses.replace(runner._decode_state.state, layers=layers)
    runner._decode_state = dataclasses.replace(runner._decode_state, state=state)
    order = dice.permutation(SMALL_PLAN.num_pages)
    source, to = order[:pages], order[pages : 2 * pages - first]
    prefix = runner.offload(source.tolist(), 5)
    prefix.finish()
    runner.restore(prefix, first, to.tolist(), 2)
    for old, new in zip(before, runner._decode_state.state.layers, strict=True):
        expected = jax.tree.map(np.copy, old)
        for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(old), strict=True):
            if isinstance(old, KeyValues):
                x[to] = y[source[first:]]
            else:
                x[2] = y[5]
        assert jax.tree.all(jax.tree.map(np.array_equal, expected, new))


def _block_hashes(inputs):
    return prepare_request(inputs, GREEDY_OPTIONS, 70).block_hashes


def _gated_delta_layers(state):
    return [layer for layer in state.layers if isinstance(layer, GatedDeltaState)]


def test_outputs_end_at_stop_tokens_and_stop_texts(demo, engine, alone):
    inputs, options = request(demo, text("Count."), max_new_tokens=30)
    free = alone(inputs, options)
    stop = next(i for i in free[5:] if i not in free[:5])
    stopped = demo.options(**GREEDY, max_new_tokens=30, stop_token_ids=[stop])
    tokens, reason = run(generate_ids(engine, inputs, stopped))
    assert (tokens, reason) == (free[: free.index(stop)], "stop")
    many = [i for i in range(stop) if i not in free][:30] + [stop]  # more than the device checks
    assert run(generate_ids(engine, inputs, demo.options(**GREEDY, max_new_tokens=30, stop_token_ids=many)))[0] == tokens
    whole = demo.detokenizer.decode(free)
    words = demo.options(**GREEDY, max_new_tokens=30, stop=[whole[4:6]])

    async def texts():
        with submitted(engine, inputs, words) as handle:
            return "".join([delta.text async for delta in handle.deltas()])

    assert run(texts()) == whole[: whole.find(whole[4:6])]


def test_output_ends_at_the_context_length(demo, engine):
    inputs = Inputs(np.full(SMALL_PLAN.max_model_len - 5, 65, np.int32), ())
    tokens, reason = run(generate_ids(engine, inputs, demo.options(**GREEDY)))
    assert (len(tokens), reason) == (5, "length")


def test_logprobs_equal_the_generators(demo, engine):
    inputs, options = request(demo, text("Log."), logprobs=3, max_new_tokens=6)
    right = list(demo.generator.tokens(inputs, options))

    async def scenario():
        with submitted(engine, inputs, options) as handle:
            return [token async for delta in handle.deltas() for token in delta.tokens]

    for token, other in zip(run(scenario()), right, strict=True):
        assert token.id == other.id and [i for i, _ in token.top] == [i for i, _ in other.top]
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_deltas_are_streamed_and_cancelling_frees_the_slot(demo, engine):
    inputs, options = request(demo, text("long"), max_new_tokens=1500)

    async def scenario():
        with submitted(engine, inputs, options) as handle:
            deltas = handle.deltas()
            assert (await anext(deltas)).tokens
            handle.close()
            with pytest.raises(Cancelled):
                await anext(deltas)
        while engine.slots.num_free < SMALL_PLAN.max_running:
            await asyncio.sleep(0.01)
        assert engine.scheduler.num_decoding == 0

    run(scenario())


def test_request_cancelled_during_preparation_is_not_submitted(demo, engine):
    async def scenario():
        handle = engine.reserve()
        handle.cancel()
        assert engine.num_reserved == 1  # reserved until `close`
        with pytest.raises(Cancelled):
            handle.submit(*request(demo, text("hello")))
        handle.close()
        handle.close()  # the second call frees nothing
        assert engine.num_reserved == 0

    run(scenario())


def test_capacity_is_bounded_from_reservation_on(demo, engine):
    async def scenario():
        handles = [engine.reserve() for _ in range(engine.capacity)]
        with pytest.raises(EngineFull, match=f"{engine.capacity} requests"):
            engine.reserve()
        for handle in handles:
            handle.close()

    run(scenario())


def test_slow_reader_delays_no_other_request(demo, engine, alone):
    slow, quick = request(demo, text("slow"), max_new_tokens=100), request(demo, text("quick"))

    async def scenario():
        with submitted(engine, *slow) as handle:
            await generate_ids(engine, *quick)
            while engine.num_reserved:
                await asyncio.sleep(0.01)
            return [token.id async for delta in handle.deltas() for token in delta.tokens]

    assert run(scenario()) == alone(*slow)


@pytest.mark.parametrize(("step", "call"), [("prefill", 3), ("decode", 3), ("encode", 1)])
def test_failed_step_fails_only_its_own_requests(demo, engine, mixed, expected, monkeypatch, caplog, step, call):
    original, calls = getattr(engine._runner, step), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise RuntimeError("device on fire")
        return original(*arguments)

    async def scenario():
        return await asyncio.gather(*(generate_ids(engine, *one) for one in mixed), return_exceptions=True)

    if step == "encode":
        clear_caches(engine)
    monkeypatch.setattr(engine._runner, step, failing)
    answers = run(scenario())
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    assert failed and {str(error) for error in failed} == {"device on fire"}
    assert len(failed) < len(mixed)
    for answer, right in zip(answers, expected, strict=True):
        assert isinstance(answer, RuntimeError) or answer[0] == right
    assert "device on fire" in caplog.text
    assert [run(generate_ids(engine, *one))[0] for one in mixed[:3]] == expected[:3]


def test_unreadable_samples_fail_their_requests(demo, engine, mixed, expected, monkeypatch):
    original, calls = engine._runner.decode, []

    def broken(output, mode):
        calls.append(original(output, mode))
        return object() if len(calls) == 4 else calls[-1]

    monkeypatch.setattr(engine._runner, "decode", broken)
    with pytest.raises((AttributeError, TypeError)):
        run(generate_ids(engine, *mixed[0]))
    assert run(generate_ids(engine, *mixed[0]))[0] == expected[0]


def test_request_expires_after_max_wait(demo, engine, monkeypatch):
    async def scenario():
        with contextlib.ExitStack() as cleanup:
            for i in range(SMALL_PLAN.max_running):
                long = request(demo, text(f"first {i}"), max_new_tokens=1900)
                await anext(cleanup.enter_context(submitted(engine, *long)).deltas())
            monkeypatch.setattr(engine, "policy", dataclasses.replace(engine.policy, max_wait_s=0.1))
            with pytest.raises(EngineFull, match=r"waited 0.1 seconds"):
                await generate_ids(engine, *request(demo, text("second")))

    run(scenario())


def test_stopping_finishes_running_and_waiting_requests(demo):
    long = request(demo, text("long"), max_new_tokens=900)

    async def scenario():
        tasks = [asyncio.create_task(generate_ids(engine, *long)) for _ in range(FEW_PAGES.max_running + 1)]
        while not engine.scheduler.num_decoding or not engine.scheduler.waiting:
            await asyncio.sleep(0.01)
        engine.stop()
        for task in tasks:
            with pytest.raises(EngineStopped):
                await task
        assert not engine.alive
        with pytest.raises(EngineStopped):
            engine.reserve()

    with Engine(demo, make_runner(demo, FEW_PAGES)) as engine:
        run(scenario())


def test_requests_that_can_never_be_served_are_rejected_at_once(demo, engine, photos):
    slim = {"type": "image", "image": photos[0].resize((3000, 10))}

    async def rejected(*parts, **options):
        handle = engine.reserve()
        with contextlib.closing(handle), pytest.raises(RequestRejected) as caught:
            handle.submit(*request(demo, *parts, **options))
        return str(caught.value)

    message = run(rejected(text("x" * 2100)))
    assert "the prompt has 21" in message and "this server holds 2048" in message
    assert "patches, and this server encodes 1152 at most" in run(rejected(slim, max_slice_nums=1))
    assert engine.num_reserved == 0


def test_many_streams_with_cancellations_leak_nothing(demo, engine, mixed, expected):
    """16 streams at a time, each third cancelled in the middle; all capacity is free after each round."""
    rng = np.random.default_rng(0)

    async def one(i):
        inputs, options = mixed[i % len(mixed)]
        with submitted(engine, inputs, options) as handle:
            tokens, cancels_at = [], rng.integers(1, 8) if i % 3 == 0 else None
            async for delta in handle.deltas():
                tokens += [token.id for token in delta.tokens]
                if cancels_at is not None and len(tokens) >= cancels_at:
                    return tokens == expected[i % len(mixed)][: len(tokens)]
        return tokens == expected[i % len(mixed)]

    async def scenario():
        gate = asyncio.Semaphore(16)

        async def gated(i):
            async with gate:
                return await one(i)

        return await asyncio.gather(*(gated(i) for i in range(20)))

    compiled = engine.compilations.count
    for _ in range(2):
        assert all(run(scenario()))
        wait_until(lambda: engine.num_reserved == 0)
        assert engine.slots.num_free == SMALL_PLAN.max_running
    assert engine.compilations.count == compiled


def test_metrics_count_requests_tokens_and_steps(demo, engine):
    run(generate_ids(engine, *request(demo, text("metrics"), max_new_tokens=5)))
    lines = dict(line.rsplit(" ", 1) for line in engine.metrics.text().decode().splitlines() if not line.startswith("#"))
    numbers = {name.removeprefix("minicpmv46_"): float(value) for name, value in lines.items()}
    assert numbers["running"] == numbers["waiting"] == numbers["reading"] == numbers["places_taken"] == 0
    assert numbers["slots_free"] == numbers["slots_total"] == SMALL_PLAN.max_running
    assert numbers['requests_total{outcome="length"}'] > 0 and numbers['requests_total{outcome="cancelled"}'] > 0
    assert 0 < numbers["prefix_hit_tokens_total"] < numbers["read_tokens_total"]
    assert numbers["feature_hits_total"] > 0 and numbers["feature_misses_total"] > 0
    assert numbers["time_to_first_token_seconds_count"] > 0 and numbers["time_per_output_token_seconds_count"] > 0
    assert numbers["answer_tokens_total"] > numbers["time_to_first_token_seconds_count"]
    assert numbers["host_seconds_total"] > 0 and numbers["steps_total"] > 0
    assert numbers["compilations_total"] == engine.compilations.count


def test_other_cache_salts_share_no_prefix_and_no_image(demo, engine, photos, alone):
    picture = {"type": "image", "image": photos[0].resize((110, 100))}
    inputs, options = request(demo, picture, text("salted " * 20), max_slice_nums=1, max_new_tokens=4)
    assert len(inputs.token_ids) > PAGE

    def cached(salt):
        """Returns the tokens and the images that a request with the salt takes from the caches."""
        before = engine.scheduler.cached_tokens, engine.encoder_cache.misses
        assert run(generate_ids(engine, inputs, options, salt))[0] == right
        return engine.scheduler.cached_tokens - before[0], len(inputs.views) - (engine.encoder_cache.misses - before[1])

    right = alone(inputs, options)
    assert cached("a") == (0, 0) == cached("b") == cached("")
    for salt in ("a", "b", ""):
        assert cached(salt)[0] >= PAGE


def test_hashes_without_a_salt_are_those_of_the_content_alone(demo, photos):
    inputs, options = request(
        demo, {"type": "image", "image": photos[0].resize((110, 100))}, text("words " * 30), max_slice_nums=1
    )
    unsalted, salted = (prepare_request(inputs, options, demo.config.vision.positions_per_side, salt) for salt in ("", "a"))
    first, item = inputs.token_ids[:PAGE], unsalted.mm_items[0]
    digest = hashlib.blake2b(first.tobytes() + item.mm_hash + repr(item.start).encode(), digest_size=16)
    assert item.start < PAGE and unsalted.block_hashes[0] == digest.digest()
    assert not set(unsalted.block_hashes) & set(salted.block_hashes)
    assert unsalted.mm_items[0].mm_hash != salted.mm_items[0].mm_hash
