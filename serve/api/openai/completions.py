"""POST /v1/completions: continues a text or token ids, without chat template and images. Load clients use it.

A request has one prompt and up to 16 choices. `echo`, `suffix` and a `best_of` other than `n` are refused by
name.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from minicpmv46_jax.generation.detokenize import Detokenizer
from minicpmv46_jax.generation.generate import Token
from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.generation.sampling import MAX_LOGPROBS
from minicpmv46_jax.processing import Inputs, PromptTooLong
from serve.api.common.errors import ApiError
from serve.api.common.output_stream import merged
from serve.api.common.request_pipeline import (
    ActiveRequest,
    OutputOptions,
    PreparedRequest,
    check_context,
    check_model,
    context_exceeded,
    make_options,
)
from serve.api.common.respond import respond
from serve.api.common.schema import SINGLE_VALUE_FIELDS, GenerationRequest, checked, json_object
from serve.api.common.service import Service
from serve.api.openai.chat_response import LOWEST_LOGPROB, usage
from serve.runtime.budget import RequestMemory

router = APIRouter()

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: OpenAI's fields, and vLLM's additional ones."""

    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=1)
    best_of: int | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _text_or_token_ids(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> str | list[int]:
        try:
            prompt = handler(value)
        except ValidationError:
            raise ValueError("expected a text or a list of token ids") from None
        if not prompt:
            raise ValueError("expected a text or a list of token ids, not empty")
        return prompt

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report beside each token's log probability; None for no log probabilities."""
        return self.logprobs


@router.post("/completions")
async def completions(request: Request) -> Response:
    """Continues a prompt, as one object or as a stream of chunks."""
    return await respond(request, _prepare, CompletionStream)


async def _prepare(service: Service, body: bytes, memory: RequestMemory) -> PreparedRequest:
    request, options = await service.run_check(_check, service, body, size=len(body))
    ids = await service.run_in_thread(prompt_token_ids, service, request.prompt, size=len(body))
    check_context(len(ids), request.max_tokens, service.max_model_len, "max_tokens", param="prompt")
    return PreparedRequest(OutputOptions.from_request(request), Inputs(ids, ()), options, cache_salt=request.cache_salt)


def _check(service: Service, body: bytes) -> tuple[CompletionRequest, GenerationOptions]:
    request = parse_completion(body)
    check_model(service, request.model)
    return request, make_options(service, request)


def parse_completion(body: bytes) -> CompletionRequest:
    """Parses and checks a request. Raises ApiError 400 that names the field."""
    request = checked(json_object(body), CompletionRequest, {**SINGLE_VALUE_FIELDS, "suffix": None})
    if request.best_of not in (None, request.n):
        message = f"best_of is {request.best_of}, but only {request.n} is served, the value of n"
        raise ApiError(400, message, "best_of", "unsupported_value")
    return request


def prompt_token_ids(service: Service, prompt: str | list[int]) -> np.ndarray:
    """Returns the prompt's token ids, int32. Raises ApiError for ids beyond the vocabulary."""
    if isinstance(prompt, str):
        try:
            return np.array(service.model.processor.tokenize(prompt, service.max_model_len), np.int32)
        except PromptTooLong as error:
            raise context_exceeded(service, str(error), "prompt") from None
    if (highest := max(prompt)) >= service.vocab_size:
        raise ApiError(400, f"prompt has token {highest}, but the vocabulary ends at {service.vocab_size - 1}", "prompt")
    return np.array(prompt, np.int32)


class CompletionStream:
    """The output of a submitted request as a text completion or as its chunks."""

    def __init__(self, request: ActiveRequest):
        self._request, self._options = request, request.output
        self._header = {
            "id": f"cmpl-{request.record.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.service.name,
        }

    async def collect(self) -> dict[str, Any]:
        """Returns all choices as one object."""
        choices = await asyncio.gather(*(self._collect_choice(i) for i in range(self._options.n)))
        return {**self._header, "choices": choices, "usage": usage(self._request.record)}

    async def _collect_choice(self, index: int) -> dict[str, Any]:
        deltas = [delta async for delta in self._request.deltas(index)]
        text = "".join(delta.text for delta in deltas)
        tokens = [token for delta in deltas for token in delta.tokens]
        logprobs = self._new_logprobs().add(tokens) if self._options.logprobs else None
        return _choice(index, text, deltas[-1].finish_reason, logprobs)

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yields one chunk per delta, even without text, because load clients count chunks."""
        n, options = self._options.n, self._options.stream_options
        logprobs = [self._new_logprobs() for _ in range(n)]
        async with aclosing(merged([self._request.deltas(i) for i in range(n)])) as deltas:
            async for index, delta in deltas:
                entry = logprobs[index].add(delta.tokens) if self._options.logprobs and delta.tokens else None
                chunk = {**self._header, "choices": [_choice(index, delta.text, delta.finish_reason, entry)]}
                if options.continuous_usage_stats and options.include_usage:
                    chunk["usage"] = usage(self._request.record)
                yield chunk
        if options.include_usage:
            yield {**self._header, "choices": [], "usage": usage(self._request.record)}

    def _new_logprobs(self) -> "CompletionLogprobs":
        return CompletionLogprobs(self._request.service.model.detokenizer)


def _choice(index: int, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


class CompletionLogprobs:
    """Log probabilities of one choice in the completions format.

    Token text is the token's UTF-8 text. A token that is part of a character is written as OpenAI does,
    `bytes:\\xe2\\x82`.
    """

    def __init__(self, detokenizer: Detokenizer):
        self._detokenizer = detokenizer
        self._text = detokenizer.stream()
        self._offset = 0

    def add(self, tokens: Iterable[Token]) -> dict[str, Any]:
        """Returns the log probabilities of the next tokens.

        `top_logprobs` has each token's alternatives, best first, and the sampled token itself. `text_offset`
        is the characters of the choice's text before each token.
        """
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text, logprob = self._token_text(token.id), max(token.logprob, LOWEST_LOGPROB)
            top = {self._token_text(token_id): max(value, LOWEST_LOGPROB) for token_id, value in token.top}
            out["tokens"].append(text)
            out["token_logprobs"].append(logprob)
            out["top_logprobs"].append({**top, text: logprob})
            out["text_offset"].append(self._offset)
            self._offset += len(self._text.push(token.id))
        return out

    def _token_text(self, token_id: int) -> str:
        raw = self._detokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
