"""Helpers of the engine's tests: requests to the demo model, and their outputs."""

import asyncio
import contextlib
import threading

TIMEOUT_S = 300  # two cores may be shared with other processes
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def wait_until(true):
    event = threading.Event()
    for _ in range(TIMEOUT_S * 100):
        if true():
            return
        event.wait(0.01)
    raise AssertionError("the condition did not become true")


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, TIMEOUT_S))


@contextlib.contextmanager
def submitted(engine, inputs, options, cache_salt=""):
    handle = engine.reserve()
    try:
        handle.submit(inputs, options, cache_salt)
        yield handle
    finally:
        handle.close()


async def generate(engine, inputs, options, cache_salt=""):
    """Returns tokens with their log probabilities, and the finish reason."""
    tokens, reason = [], None
    with submitted(engine, inputs, options, cache_salt) as handle:
        async for delta in handle.deltas():
            tokens += delta.tokens
            reason = delta.finish_reason
    return tokens, reason


async def generate_ids(engine, inputs, options, cache_salt=""):
    """Returns token ids and the finish reason."""
    tokens, reason = await generate(engine, inputs, options, cache_salt)
    return [token.id for token in tokens], reason


def text(words):
    return {"type": "text", "text": words}


def request(demo, *parts, **options):
    return demo.prepare([{"role": "user", "content": list(parts)}], {**GREEDY, "max_new_tokens": 24, **options})
