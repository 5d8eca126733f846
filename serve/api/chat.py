"""POST /v1/chat/completions.

Everything that can be wrong with a request is found before its answer starts, so that it gets a status of its own; the first
step of a stream is awaited too. Preparing (JSON, pictures, tokens) runs in threads, decoding in the engine's.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from minicpmv46_jax.options import GenerationOptions
from minicpmv46_jax.processing import Inputs
from minicpmv46_jax.processing.messages import check_choices
from serve.api.answers import Header, logprobs, usage
from serve.api.errors import ApiError, user_mistakes
from serve.api.exchange import Exchange, exchange_of, read_body
from serve.api.schema import FIELDS, ChatRequest, parse
from serve.api.service import Service
from serve.api.sse import EventStream
from serve.engine import Job

router = APIRouter()

SAME_NAMES = (  # here and in `minicpmv46_jax.options`
    "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed stop stop_token_ids ignore_eos"
).split()


@dataclasses.dataclass(frozen=True)
class Form:
    """How the client wants its answer. All of a request that outlives its preparation: the rest may be megabytes of base64."""

    stream: bool
    logprobs: bool
    include_usage: bool


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request ready for the engine."""

    form: Form
    inputs: Inputs
    options: GenerationOptions


@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answers a conversation, at once or as a stream."""
    service, exchange = request.app.state.service, exchange_of(request)
    body = await read_body(request, service.max_body_bytes)
    async with AsyncExitStack() as cleanup:
        job = service.engine.reserve()
        cleanup.callback(job.close)
        cleanup.callback(_cancel_on_disconnect(request, job).cancel)
        prepared = await service.in_thread(prepare, service, body)
        exchange.prompt_tokens = len(prepared.inputs.token_ids)
        job.submit(prepared.inputs, prepared.options)
        answer = Answer(service, exchange, prepared.form, job)
        del prepared, body  # an answer may take far longer than its pictures are needed
        if not answer.form.stream:
            return JSONResponse(await answer.whole())
        chunks = answer.chunks()
        cleanup.push_async_callback(chunks.aclose)
        return EventStream(await anext(chunks), chunks, cleanup.pop_all())


def prepare(service: Service, body: bytes) -> Prepared:
    """All that comes before the engine. Raises ApiError for the client's mistakes."""
    request = parse(body)
    if request.model != service.name:
        message = f"the model {request.model[:200]!r} does not exist here; this server has {service.name!r}"
        raise ApiError(404, message, "model", "model_not_found")
    with user_mistakes(FIELDS):
        check_choices(request.mm_processor_kwargs, "mm_processor_kwargs")
        options = service.model.options(**generation_choices(request))
    with user_mistakes(FIELDS, "messages"):
        inputs = service.model.process(request.messages, **prompt_choices(request))
    check_context(len(inputs.token_ids), request, service.context)
    return Prepared(Form(request.stream, request.logprobs, request.include_usage), inputs, options)


def generation_choices(request: ChatRequest) -> dict[str, Any]:
    """The library's decoding options."""
    return {
        **{name: getattr(request, name) for name in SAME_NAMES},
        "max_new_tokens": request.max_new_tokens,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
    }


def prompt_choices(request: ChatRequest) -> dict[str, Any]:
    """The library's options for making a prompt."""
    opening = not request.continue_final_message if request.add_generation_prompt is None else request.add_generation_prompt
    return {
        "tools": None if request.tool_choice == "none" else request.tools or None,
        "add_generation_prompt": opening,
        "continue_final_message": request.continue_final_message,
        "chat_template_kwargs": request.chat_template_kwargs,
        **request.mm_processor_kwargs,
    }


def check_context(prompt: int, request: ChatRequest, context: int) -> None:
    """Refuses, as OpenAI and vLLM do, what would not fit."""
    answer = request.max_new_tokens
    if prompt >= context:
        fault = f"your prompt has {prompt} tokens, pictures included, which leaves no room for an answer"
        raise ApiError(400, f"the context holds {context} tokens, but {fault}", "messages", "context_length_exceeded")
    if answer is not None and prompt + answer > context:
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        fault = f"your prompt has {prompt} tokens and {name} is {answer}, together {prompt + answer}"
        raise ApiError(400, f"the context holds {context} tokens, but {fault}", name, "context_length_exceeded")


class Answer:
    """A submitted request's way back to its client."""

    def __init__(self, service: Service, exchange: Exchange, form: Form, job: Job):
        self.form = form
        self._job, self._exchange = job, exchange
        self._detokenizer = service.model.detokenizer
        self._header = Header(f"chatcmpl-{exchange.id}", service.name)

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        texts, tokens, reason = [], [], None
        async for delta in self._job.deltas():
            self._exchange.completion_tokens += len(delta.tokens)
            texts.append(delta.text)
            tokens += delta.tokens if self.form.logprobs else ()
            reason = delta.finish_reason
        assert reason is not None
        return self._header.completion("".join(texts), reason, self._logprobs(tokens), self._usage())

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in pieces; the first comes with the engine's first step."""
        first = True
        async for delta in self._job.deltas():
            self._exchange.completion_tokens += len(delta.tokens)
            if first:
                yield self._chunk({"role": "assistant", "content": ""})
                first = False
            if delta.text or (self.form.logprobs and delta.tokens):
                yield self._chunk({"content": delta.text}, logprobs=self._logprobs(delta.tokens))
            if delta.finish_reason is not None:
                yield self._chunk({}, delta.finish_reason)
        if self.form.include_usage:
            yield self._header.usage_chunk(self._usage())

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, logprobs: dict | None = None) -> dict[str, Any]:
        chunk = self._header.chunk(delta, finish_reason, logprobs)
        return {**chunk, "usage": None} if self.form.include_usage else chunk  # OpenAI says null until the last

    def _logprobs(self, tokens) -> dict[str, Any] | None:
        return logprobs(tokens, self._detokenizer) if self.form.logprobs else None

    def _usage(self) -> dict[str, int]:
        return usage(self._exchange.prompt_tokens, self._exchange.completion_tokens)


def _cancel_on_disconnect(request: Request, job: Job) -> asyncio.Task:
    """Watches the connection once the body has been read, when nothing but its end can come."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    return asyncio.create_task(watch())
