"""What the engine's tests share: requests to the small model, and their answers."""

import asyncio
import contextlib
import threading

PATIENCE_S = 300  # two cores may be shared with others
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def wait_until(true):
    event = threading.Event()
    for _ in range(PATIENCE_S * 100):
        if true():
            return
        event.wait(0.01)
    raise AssertionError("it did not come")


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, PATIENCE_S))


@contextlib.contextmanager
def submitted(engine, inputs, options):
    job = engine.reserve()
    try:
        job.submit(inputs, options)
        yield job
    finally:
        job.close()


async def answer(engine, inputs, options):
    """Tokens, with what was reported of each, and the reason."""
    tokens, reason = [], None
    with submitted(engine, inputs, options) as job:
        async for delta in job.deltas():
            tokens += delta.tokens
            reason = delta.finish_reason
    return tokens, reason


async def ask(engine, inputs, options):
    """Token ids and the reason."""
    tokens, reason = await answer(engine, inputs, options)
    return [token.id for token in tokens], reason


def text(words):
    return {"type": "text", "text": words}


def request(demo, *parts, **options):
    return demo.prepare([{"role": "user", "content": list(parts)}], {**GREEDY, "max_new_tokens": 24, **options})
