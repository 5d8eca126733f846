"""POST /v1/chat/completions."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from minicpmv46_jax.generation.generate import Token
from serve.api.common.output_stream import CollectedOutput, OutputStep, merged
from serve.api.common.request_pipeline import ActiveRequest, ParsedRequest, PreparedRequest, prepare_chat
from serve.api.common.respond import respond
from serve.api.common.schema import parse_chat
from serve.api.common.service import Service
from serve.api.openai.chat_response import Header, deltas_of, logprobs, usage
from serve.parsers import ToolCall
from serve.runtime.budget import RequestMemory

router = APIRouter()


@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Generates the next message of a conversation, as one object or as a stream of chunks."""
    return await respond(request, _prepare, ChatStream)


async def _prepare(service: Service, body: bytes, memory: RequestMemory) -> PreparedRequest:
    return await prepare_chat(service, lambda body: ParsedRequest(parse_chat(body)), body, memory)


class ChatStream:
    """The output of a submitted request as a chat completion or as its chunks."""

    def __init__(self, request: ActiveRequest):
        self._request, self._options = request, request.output
        self._header = Header(f"chatcmpl-{request.record.id}", request.service.name)

    async def collect(self) -> dict[str, Any]:
        """Returns all choices as one object."""
        outputs = await asyncio.gather(*(self._collect_choice(i) for i in range(self._options.n)))
        choices = [self._header.choice(i, output, self._logprobs(output.tokens)) for i, output in enumerate(outputs)]
        return self._header.completion(choices, usage(self._request.record))

    async def _collect_choice(self, index: int) -> CollectedOutput:
        output = CollectedOutput()
        async for step in self._request.steps(index):
            output.add(step)
        return output

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the chunks of all choices; the first comes with the engine's first delta."""
        open_choices = [_OpenChoice() for _ in range(self._options.n)]
        async with aclosing(merged([self._request.steps(i) for i in range(self._options.n)])) as steps:
            async for index, step in steps:
                for chunk in self._step_chunks(index, open_choices[index], step):
                    yield chunk
        if self._options.stream_options.include_usage:
            yield self._header.usage_chunk(usage(self._request.record))

    def _step_chunks(self, index: int, choice: "_OpenChoice", step: OutputStep) -> list[dict[str, Any]]:
        """Returns a step's chunks. The role precedes the first text; log probabilities come with the next
        text."""
        chunks = []
        if not choice.started:
            choice.started = True
            chunks.append(self._chunk(index, {"role": "assistant", "content": ""}))
        choice.tokens += step.tokens if self._options.logprobs else ()
        for part in step.parts:
            for delta in deltas_of(part, choice.num_calls):
                chunks.append(self._chunk(index, delta, logprobs=self._take_logprobs(choice)))
            choice.num_calls += isinstance(part, ToolCall)
        if step.finish_reason is not None:
            chunks.append(self._chunk(index, {}, step.finish_reason, self._take_logprobs(choice)))
        return chunks

    def _take_logprobs(self, choice: "_OpenChoice") -> dict[str, Any] | None:
        tokens, choice.tokens = choice.tokens, []
        return self._logprobs(tokens) if tokens else None

    def _chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: dict | None = None
    ) -> dict[str, Any]:
        chunk = self._header.chunk(index, delta, finish_reason, logprobs)
        options = self._options.stream_options
        if options.continuous_usage_stats and options.include_usage:
            return {**chunk, "usage": usage(self._request.record)}
        return {**chunk, "usage": None} if options.include_usage else chunk  # as OpenAI: null before the last chunk

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return logprobs(tokens, self._request.service.model.detokenizer) if self._options.logprobs else None


class _OpenChoice:
    """The state of a choice between two chunks."""

    def __init__(self):
        self.started, self.num_calls = False, 0
        self.tokens: list[Token] = []  # whose log probabilities have not been sent
