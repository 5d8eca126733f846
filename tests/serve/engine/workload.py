"""Requests that together run every device program of the small engine, and a check that all is free."""

import asyncio

import numpy as np

from tests.serve.engine.engine_client import generate_ids, request, run, text, wait_until

LONG_WORDS = "remember this well, " * 16  # more tokens than a step prefills, so its prefix is worth a copy to the host


class Letters:
    """A constraint that allows lower-case letters alone."""

    def __init__(self, model):
        self._mask = np.zeros(-(-model.config.text.vocab_size // 32), np.uint32)
        for token in model.processor.tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]:
            self._mask[token // 32] |= np.uint32(1 << token % 32)

    def mask(self):
        return self._mask

    def advance(self, token):
        pass


def make_workload(demo, photos):
    """Returns requests by name, each deterministic."""
    flower = {"type": "image", "image": photos[1].resize((120, 90))}
    options = {"max_new_tokens": 10}
    return {
        "plain": request(demo, text("Hi"), **options),
        "long": request(demo, text(LONG_WORDS), **options),
        "sampled": request(demo, text("Sample this."), temperature=0.9, top_p=0.9, seed=7, **options),
        "image": request(demo, flower, text("What?"), max_slice_nums=1, **options),
        "penalties": request(demo, text("Repeat."), repetition_penalty=1.3, frequency_penalty=0.5, **options),
        "bias": request(demo, text("Bias."), logit_bias={77: 5.0}, **options),
        "grammar": request(demo, text("Letters."), constraint=Letters(demo), **options),
        "other": request(demo, text("y" * 90), max_new_tokens=4),
    }


def answers(engine, requests):
    """Returns the token ids, or the error, of each request by name; all run together."""

    async def scenario():
        return await asyncio.gather(*(generate_ids(engine, *one) for one in requests.values()), return_exceptions=True)

    found = dict(zip(requests, run(scenario()), strict=True))
    return {name: one if isinstance(one, BaseException) else one[0] for name, one in found.items()}


def clear_caches(engine):
    """Clears the caches of an idle engine."""
    wait_until(lambda: engine._in_flight is None and all(offload.finished.done() for offload in engine._offloads))
    engine._keep_offloaded()
    engine.scheduler.reset(())
    engine.encoder_cache.clear()


def fill_prefix_cache(demo, engine, words, number):
    """Prefills other prompts, so that they take the prefix cache."""
    others = {i: request(demo, text(f"{i} {words}"), max_new_tokens=1) for i in range(number)}
    assert all(isinstance(one, list) for one in answers(engine, others).values())


def offload_prefix(demo, engine, one):
    """Runs a request with a long prompt, and evicts its prefix to host memory."""
    clear_caches(engine)
    run(generate_ids(engine, *one))
    fill_prefix_cache(demo, engine, "x" * 70, engine.snapshots.count)
    wait_until(lambda: all(offload.finished.done() for offload in engine._offloads))


def assert_all_free(engine):
    """Waits until the engine is idle; then only its caches hold pages, slots and rows."""
    wait_until(lambda: engine.num_reserved == 0 and engine._in_flight is None)
    scheduler, cached = engine.scheduler, engine.prefix_cache
    assert engine.alive and engine.slots.num_free == engine.slots.count
    assert not engine._states and not engine._awaiting_mask and not scheduler.waiting and not scheduler.prefilling
    nodes, num_snapshots = (len(cached._nodes), cached.num_snapshots) if cached else (0, 0)
    assert engine.pages.num_free == engine.pages.count - nodes
    assert engine.snapshots.num_free == engine.snapshots.count - num_snapshots
    assert all(not entry.pins for entry in engine.encoder_cache._entries.values())
    assert engine.encoder_cache.num_used == sum(len(entry.rows) for entry in engine.encoder_cache._entries.values())
    assert engine.host_cache.used_bytes == sum(prefix.nbytes for prefix in engine.host_cache._prefixes.values())
