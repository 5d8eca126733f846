"""POST /v1/chat/completions.

The first step of a stream is awaited before its status goes out, so that a fault there has a status of its own.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serve.api.common.output_stream import CollectedOutput, OutputStep
from serve.api.common.request_pipeline import ActiveRequest, ParsedRequest, submit_request
from serve.api.common.schema import parse
from serve.api.common.sse import EventStream
from serve.api.openai.chat_response import Header, deltas_of, logprobs, usage
from serve.parsers import ToolCall

router = APIRouter()


@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answers a conversation, at once or as a stream."""
    async with AsyncExitStack() as cleanup:
        answer = ChatStream(await submit_request(request, cleanup, lambda body: ParsedRequest(parse(body))))
        if not answer.form.stream:
            return JSONResponse(await answer.whole())
        chunks = answer.chunks()
        cleanup.push_async_callback(chunks.aclose)
        return EventStream(await anext(chunks), chunks, cleanup.pop_all())


class ChatStream:
    """A submitted request's way back to its client."""

    def __init__(self, asked: ActiveRequest):
        self.form = asked.form
        self._asked, self._record = asked, asked.record
        self._header = Header(f"chatcmpl-{asked.record.id}", asked.service.name)

    async def whole(self) -> dict[str, Any]:
        """The answers as one object."""
        wholes = await asyncio.gather(*(self._collected(i) for i in range(self.form.n)))
        choices = [self._header.choice(i, whole, self._logprobs(whole.tokens)) for i, whole in enumerate(wholes)]
        return self._header.completion(choices, self._usage())

    async def _collected(self, index: int) -> CollectedOutput:
        whole = CollectedOutput()
        async for step in self._asked.steps(index):
            whole.add(step)
        return whole

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answers in pieces, as they come; the first comes with the engine's first step."""
        open_choices = [_OpenChoice() for _ in range(self.form.n)]
        async with aclosing(_merged([self._asked.steps(i) for i in range(self.form.n)])) as steps:
            async for index, step in steps:
                for chunk in self._step_chunks(index, open_choices[index], step):
                    yield chunk
        if self.form.stream_options.include_usage:
            yield self._header.usage_chunk(self._usage())

    def _step_chunks(self, index: int, choice: "_OpenChoice", step: OutputStep) -> list[dict[str, Any]]:
        """A step as chunks: who speaks before the first words; log probabilities with the first words after their tokens."""
        chunks = []
        if not choice.begun:
            choice.begun = True
            chunks.append(self._chunk(index, {"role": "assistant", "content": ""}))
        choice.tokens += step.tokens if self.form.logprobs else ()
        for part in step.parts:
            for delta in deltas_of(part, choice.calls):
                chunks.append(self._chunk(index, delta, logprobs=self._taken(choice)))
            choice.calls += isinstance(part, ToolCall)
        if step.finish_reason is not None:
            chunks.append(self._chunk(index, {}, step.finish_reason, self._taken(choice)))
        return chunks

    def _taken(self, choice: "_OpenChoice") -> dict[str, Any] | None:
        tokens, choice.tokens = choice.tokens, []
        return self._logprobs(tokens) if tokens else None

    def _chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: dict | None = None
    ) -> dict[str, Any]:
        chunk = self._header.chunk(index, delta, finish_reason, logprobs)
        wanted = self.form.stream_options
        if wanted.continuous_usage_stats and wanted.include_usage:
            return {**chunk, "usage": self._usage()}
        return {**chunk, "usage": None} if wanted.include_usage else chunk  # OpenAI says null until the last

    def _logprobs(self, tokens) -> dict[str, Any] | None:
        return logprobs(tokens, self._asked.service.model.detokenizer) if self.form.logprobs else None

    def _usage(self) -> dict[str, Any]:
        return usage(self._record)


class _OpenChoice:
    """What a choice's next chunk depends on."""

    def __init__(self):
        self.begun, self.calls, self.tokens = False, 0, []


async def _merged(streams: list[AsyncIterator[OutputStep]]) -> AsyncIterator[tuple[int, OutputStep]]:
    """Steps of several answers, each as it comes."""
    if len(streams) == 1:
        async for step in streams[0]:
            yield 0, step
        return
    waiting = {asyncio.ensure_future(anext(stream, None)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                if (step := task.result()) is not None:
                    yield index, step
                    waiting[asyncio.ensure_future(anext(streams[index], None))] = index
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
