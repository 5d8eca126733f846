"""Shared by the server's tests: a fake model with known answers, and helpers to send requests to its server.

The fake model answers with the prompt in capitals or with a text that the test sets, one byte per step.
"""

import asyncio
import contextlib
import json
import socket
import threading
from types import SimpleNamespace

import httpx
import numpy as np
import uvicorn

from minicpmv46_jax.config import GenerationConfig
from minicpmv46_jax.generation.detokenize import Detokenizer
from minicpmv46_jax.generation.generate import Token
from minicpmv46_jax.generation.options import generation_options
from minicpmv46_jax.library import Delta
from minicpmv46_jax.processing import Inputs, PromptPlan
from minicpmv46_jax.processing.chat import check_characters
from serve.api import Service, create_app
from serve.runtime.http_protocol import BoundedHttpProtocol
from tests.serve.engine.serial_engine import SerialEngine

NAME = "fake"
CONTEXT = 200
PATIENCE_S = 20  # for events that come at once unless something is broken


class FakeDetokenizer(Detokenizer):
    """A detokenizer whose tokens are bytes."""

    def __init__(self):
        self.special = frozenset()

    def token_bytes(self, token_id):
        return bytes([token_id])


class FakeTokenizer:
    """The matching tokenizer."""

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}


class FakeProcessor:
    """The matching processor. Prompts have no media."""

    tokenizer = FakeTokenizer()

    def tokenize(self, text, max_tokens=None):
        if max_tokens is not None:
            check_characters(text, max_tokens)
        return self.tokenizer(text)["input_ids"]

    def assemble(self, plan, media):
        assert not media
        return Inputs(plan.token_ids, ())


class FakeModel:
    """A model with the methods of MiniCPMV that the server calls, and switches for tests.

    Attributes:
      gate: if not None, each step waits for one release of this semaphore.
      fault: if not None, raised by the third step.
      opening: text that the template appends to the last message.
      say: returns the answer's text for a prompt's text.
      calls: the options of each call of `plan`.
      started, ended: prompts whose generation has started and ended, in order; `changed` guards them.
    """

    def __init__(self):
        self.config = SimpleNamespace(text=SimpleNamespace(max_position_embeddings=CONTEXT, vocab_size=256))
        self.generation_config = GenerationConfig(stop_token_ids=(0,))
        self.detokenizer = FakeDetokenizer()
        self.processor = FakeProcessor()
        self.opening, self.say = "", str.upper
        self.gate: threading.Semaphore | None = None
        self.fault: Exception | None = None
        self.plan_fault: Exception | None = None
        self.calls, self.started, self.ended = [], [], []
        self.changed = threading.Condition()

    def plan(self, messages, max_tokens=None, **options):
        if self.plan_fault is not None:
            raise self.plan_fault
        self.calls.append(options)
        if not messages:
            raise ValueError("messages is empty")
        return PromptPlan(prompt(messages[-1]["content"] + self.opening).token_ids)

    def options(self, **options):
        return generation_options(self.generation_config, **options)

    def generate(self, inputs, options):
        text = bytes(inputs.token_ids.tolist()).decode()
        self._append(self.started, text)
        answer = constrained(self.say(text).encode(), options.constraint)
        limit = options.max_new_tokens or len(answer)
        try:
            for i, byte in enumerate(answer[:limit]):
                if self.gate is not None:
                    self.gate.acquire()
                if self.fault is not None and i == 2:
                    raise self.fault
                top = tuple((byte + k, -1.0 - k) for k in range(options.logprobs or 0))
                yield Delta(chr(byte), (Token(byte, -1.0, top),))
            yield Delta("", (), "stop" if limit >= len(answer) else "length")
        finally:
            self._append(self.ended, text)

    def wait_for(self, notes, text):
        """Blocks until `text` is in `notes` (`started` or `ended`)."""
        with self.changed:
            assert self.changed.wait_for(lambda: text in notes, PATIENCE_S), f"{text!r} did not come; {notes}"

    def _append(self, notes, text):
        with self.changed:
            notes.append(text)
            self.changed.notify_all()


def constrained(preferred, constraint):
    """Returns the output of a model that prefers these bytes, under a constraint."""
    if constraint is None:
        return preferred
    output = bytearray()
    while len(output) < 500:
        mask = constraint.mask()
        tokens = [i for i in range(256) if mask[i // 32] >> (i % 32) & 1]
        # Preferred bytes, then those that end a document soonest.
        likely = [*preferred[len(output) : len(output) + 1], *b'\0}"]:0 ', *tokens]
        token = next(i for i in likely if i in tokens)
        if token == 0:
            break
        constraint.advance(token)
        output.append(token)
    return bytes(output)


def prompt(text):
    return Inputs(np.frombuffer(text.encode(), np.uint8).astype(np.int32), ())


@contextlib.contextmanager
def serving(model, max_waiting=16, **fields):
    """Yields a service around a model."""
    service = Service(model, SerialEngine(model, max_waiting), NAME, **fields)
    try:
        yield service
    finally:
        if getattr(model, "gate", None) is not None:
            model.gate.release(10_000)  # so that the engine thread can end
        service.close()
        assert not service.engine.alive


def client(service, **options):
    """Returns an httpx client of the application, in this event loop."""
    transport = httpx.ASGITransport(create_app(service))
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=PATIENCE_S, **options)


def body(text="hello", **fields):
    return {"model": NAME, "messages": [{"role": "user", "content": text}], **fields}


def ask(service, content=None, path="/v1/chat/completions", headers=None, **fields):
    """Sends one request. `content` replaces the body that is made of the fields."""

    async def post():
        async with client(service) as http:
            data = json.dumps({**body(), **fields}) if content is None else content
            return await http.post(path, content=data, headers=headers)

    return asyncio.run(post())


def events(text):
    """Returns the objects of a stream that ended with [DONE]."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines), lines
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def content_of(chunks):
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])


class _ReadyServer(uvicorn.Server):
    """A server that sets an event once it accepts connections."""

    def __init__(self, config):
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets=None):
        await super().startup(sockets)
        self.ready.set()


@contextlib.contextmanager
def live(service):
    """Yields the address of a real server on a loopback port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(service), http=BoundedHttpProtocol, log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
        server = _ReadyServer(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        assert server.ready.wait(PATIENCE_S)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
