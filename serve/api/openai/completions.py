"""POST /v1/completions: a text or token ids, continued. What load clients speak; no template, no pictures.

Answered are one prompt a request and one answer a prompt; all other fields are refused by name.
"""

import asyncio
import json
import reprlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.library import Delta
from minicpmv46_jax.processing import Inputs
from serve.api.common.errors import ApiError, user_mistakes
from serve.api.common.middleware import RequestRecord, read_body, request_record
from serve.api.common.request_pipeline import check_model
from serve.api.common.service import Service
from serve.api.common.sse import EventStream
from serve.api.openai.chat_response import usage
from serve.engine.engine_client import RequestHandle

router = APIRouter()

DEFAULT_MAX_TOKENS = 16  # OpenAI's
# Fields that say what is done anyway, and OpenAI's bookkeeping.
SINGLE_VALUE_FIELDS: dict[str, Any] = {"n": 1, "best_of": 1, "echo": False, "suffix": None, "logprobs": None, "logit_bias": {}}
IGNORED_FIELDS = frozenset({"user"})
SAME_NAMES = (
    "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed stop_token_ids ignore_eos".split()
)

TokenId = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(_Strict):
    """Whether a last chunk tells the usage."""

    include_usage: bool = False


class CompletionRequest(_Strict):
    """OpenAI's fields, and vLLM's from top_k on."""

    model: str
    prompt: str | list[TokenId]
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False

    @field_validator("prompt")
    @classmethod
    def _something(cls, prompt: str | list[int]) -> str | list[int]:
        if not prompt:
            raise ValueError("expected a text or a list of token ids, not empty")
        return prompt


FIELDS = frozenset(CompletionRequest.model_fields)


@router.post("/completions")
async def completions(request: Request) -> Response:
    """Continues a prompt, at once or as a stream."""
    service, record = request.app.state.service, request_record(request)
    body = await read_body(request, service.max_body_bytes)
    async with AsyncExitStack() as cleanup:
        job = service.engine.reserve()
        cleanup.callback(job.close)
        cleanup.callback(_watch(request, job).cancel)
        asked, inputs, options = await service.in_thread(prepare, service, body)
        record.prompt_tokens = len(inputs.token_ids)
        job.submit(inputs, options)
        answer = CompletionStream(service.name, record, asked.stream_options.include_usage, job)
        if not asked.stream:
            return JSONResponse(await answer.whole())
        chunks = answer.chunks()
        cleanup.push_async_callback(chunks.aclose)
        return EventStream(await anext(chunks), chunks, cleanup.pop_all())


def prepare(service: Service, body: bytes) -> tuple[CompletionRequest, Inputs, GenerationOptions]:
    """All that comes before the engine. Raises ApiError for the client's mistakes."""
    asked = parse(body)
    check_model(service, asked.model)
    with user_mistakes(FIELDS):
        choices = {name: getattr(asked, name) for name in SAME_NAMES}
        options = service.model.options(**choices, stop=asked.stop, max_new_tokens=asked.max_tokens)
    ids = token_ids(service, asked.prompt)
    total = len(ids) + asked.max_tokens
    if total > service.context:
        fault = f"your prompt has {len(ids)} tokens and max_tokens is {asked.max_tokens}, together {total}"
        raise ApiError(400, f"the context holds {service.context} tokens, but {fault}", "prompt", "context_length_exceeded")
    return asked, Inputs(ids, ()), options


def token_ids(service: Service, prompt: str | list[int]) -> np.ndarray:
    """A text's tokens, int32, or those given. Raises ApiError for ids that are no words."""
    if isinstance(prompt, str):
        return np.array(service.model.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"], np.int32)
    size = service.model.config.text.vocab_size
    if (highest := max(prompt)) >= size:
        raise ApiError(400, f"prompt has token {highest}, but the vocabulary ends at {size - 1}", "prompt")
    return np.array(prompt, np.int32)


def parse(body: bytes) -> CompletionRequest:
    """A checked request. Raises ApiError 400 that names the field."""
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ApiError(400, "the body is JSON, but no object")
    said = {name: value for name, value in raw.items() if value is not None and name not in IGNORED_FIELDS}
    for name in [name for name in said if name in SINGLE_VALUE_FIELDS]:
        if (value := said.pop(name)) != SINGLE_VALUE_FIELDS[name]:
            raise ApiError(
                400,
                f"{name} is {reprlib.repr(value)}, but only {SINGLE_VALUE_FIELDS[name]!r} is served",
                name,
                "unsupported_value",
            )
    try:
        return CompletionRequest.model_validate(said)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"{path!r} is not a field that is served here", path[:64], "unsupported_parameter") from None
        reason = first["msg"].removeprefix("Value error, ")
        found = "missing" if first["type"] == "missing" else f"{reprlib.repr(raw[path])}: {reason}"
        raise ApiError(400, f"{path} is {found}", path) from None


class CompletionStream:
    """A submitted request's way back to its client."""

    def __init__(self, model: str, record: RequestRecord, include_usage: bool, job: RequestHandle):
        self._record, self._job, self._include_usage = record, job, include_usage
        self._header = {"id": f"cmpl-{record.id}", "object": "text_completion", "created": int(time.time()), "model": model}

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        deltas = [self._counted(delta) async for delta in self._job.deltas()]
        text = "".join(delta.text for delta in deltas)
        return {**self._choice(text, deltas[-1].finish_reason), "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in pieces; each is sent, without text too, for load clients count them."""
        async for delta in self._job.deltas():
            self._counted(delta)
            yield self._choice(delta.text, delta.finish_reason)
        if self._include_usage:
            yield {**self._header, "choices": [], "usage": self._usage()}

    def _counted(self, delta: Delta) -> Delta:
        self._record.completion_tokens += len(delta.tokens)
        return delta

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        return {**self._header, "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]}

    def _usage(self) -> dict[str, int]:
        return usage(self._record)


def _watch(request: Request, job: RequestHandle) -> asyncio.Task:
    """Cancels the job when the connection ends; once the body has been read nothing else can come."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    return asyncio.create_task(watch())
