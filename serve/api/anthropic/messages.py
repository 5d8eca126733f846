"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serve.api.anthropic.messages_request import parse
from serve.api.common.field_names import renamed
from serve.api.common.middleware import read_body, request_record
from serve.api.common.output_stream import CollectedOutput, OutputStep
from serve.api.common.request_pipeline import ActiveRequest, ParsedRequest, check_model, make_prompt, submit_request
from serve.api.common.service import Service
from serve.api.common.sse import ANTHROPIC, EventStream
from serve.parsers import Part, Reasoning, ToolCall

router = APIRouter()

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@router.post("/messages")
async def messages(request: Request) -> Response:
    """Answers a conversation, at once or as named events."""
    async with AsyncExitStack() as cleanup:
        answer = MessageStream(await submit_request(request, cleanup, lambda body: ParsedRequest(*parse(body))))
        if not answer.stream:
            return JSONResponse(await answer.whole())
        events = answer.events()
        cleanup.push_async_callback(events.aclose)
        return EventStream(await anext(events), events, cleanup.pop_all(), ANTHROPIC)


@router.post("/messages/count_tokens")
async def count_tokens(request: Request) -> dict[str, int]:
    """How many tokens a prompt has, pictures included."""
    service = request.app.state.service
    body = await read_body(request, service.max_body_bytes)
    number = await service.in_thread(_count, service, body)
    request_record(request).prompt_tokens = number
    return {"input_tokens": number}


def _count(service: Service, body: bytes) -> int:
    chat, names = parse(body, counting=True)
    with renamed(names):
        check_model(service, chat.model)
        return len(make_prompt(service, chat).token_ids)


class MessageStream:
    """A submitted request's way back to its client."""

    def __init__(self, asked: ActiveRequest):
        self.stream = asked.form.stream
        self._asked, self._whole, self._blocks = asked, CollectedOutput(), Blocks()

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        async for step in self._asked.steps():
            self._whole.add(step)
            for _ in self._blocks.add(step):
                pass
        return {**self._head(self._blocks.done), **self._ending(), "usage": self._usage()}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as events; the first comes with the engine's first step."""
        begun = False
        async for step in self._asked.steps():
            if not begun:
                begun = True
                start = {**self._head([]), "stop_reason": None, "stop_sequence": None, "usage": self._usage()}
                yield {"type": "message_start", "message": {**start, "usage": {**start["usage"], "output_tokens": 0}}}
            self._whole.add(step)
            for event in self._blocks.add(step):
                yield event
        yield {"type": "message_delta", "delta": self._ending(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def _head(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        name = self._asked.service.name
        return {"id": f"msg_{self._asked.record.id}", "type": "message", "role": "assistant", "model": name, "content": content}

    def _ending(self) -> dict[str, Any]:
        reason = self._whole.finish_reason
        sequence = self._sequence() if reason == "stop" else None
        return {"stop_reason": "stop_sequence" if sequence else _REASONS[reason], "stop_sequence": sequence}

    def _sequence(self) -> str | None:
        """The stop text that ended the answer, found in its tokens: the answer's own text ends before it."""
        if not self._asked.stop:
            return None
        text = self._asked.service.model.detokenizer.decode([token.id for token in self._whole.tokens])
        found = [(text.find(stop), stop) for stop in self._asked.stop if stop in text]
        return min(found)[1] if found else None

    def _usage(self) -> dict[str, int]:
        record = self._asked.record
        cached = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        return {"input_tokens": record.prompt_tokens, "output_tokens": record.completion_tokens, **cached}


class Blocks:
    """An answer's content blocks, and the events that tell of them."""

    def __init__(self):
        self.done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None

    def add(self, step: OutputStep) -> Iterator[dict[str, Any]]:
        """One more step."""
        for part in step.parts:
            yield from self._add(part)
        if step.finish_reason is not None:
            yield from self._close()

    def _add(self, part: Part) -> Iterator[dict[str, Any]]:
        if isinstance(part, ToolCall):
            yield from self._close()
            yield from self._call(part)
            return
        kind = "thinking" if isinstance(part, Reasoning) else "text"
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            self._open = {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}
            yield self._event("start", content_block=dict(self._open))
        self._open[kind] += part.text
        yield self._event("delta", delta={"type": f"{kind}_delta", kind: part.text})

    def _call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        self._open = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": call.name, "input": {}}
        yield self._event("start", content_block=dict(self._open))
        yield self._event("delta", delta={"type": "input_json_delta", "partial_json": call.arguments})
        self._open["input"] = json.loads(call.arguments)
        yield from self._close()

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            yield self._event("stop")
            self.done.append(self._open)
            self._open = None

    def _event(self, what: str, **fields: Any) -> dict[str, Any]:
        return {"type": f"content_block_{what}", "index": len(self.done), **fields}
