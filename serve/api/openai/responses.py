"""POST /v1/responses: OpenAI's newer API, stateless. Nothing is kept, so a conversation comes whole with each request."""

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serve.api.common.output_stream import OutputStep
from serve.api.common.request_pipeline import ActiveRequest, ParsedRequest, submit_request
from serve.api.common.sse import TYPED, EventStream
from serve.api.openai.responses_request import parse
from serve.parsers import Part, Reasoning, ToolCall

router = APIRouter()

_ECHOED = (
    "instructions",
    "max_output_tokens",
    "metadata",
    "reasoning",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
    "user",
)


@router.post("/responses")
async def responses(request: Request) -> Response:
    """Answers a conversation, at once or as typed events."""
    said: dict[str, Any] = {}

    def make(body: bytes) -> ParsedRequest:
        chat, names, raw = parse(body)
        said.update({name: raw[name] for name in _ECHOED if name in raw})
        return ParsedRequest(chat, names)

    async with AsyncExitStack() as cleanup:
        answer = ResponseStream(await submit_request(request, cleanup, make), said)
        if not answer.stream:
            return JSONResponse(await answer.whole())
        events = answer.events()
        cleanup.push_async_callback(events.aclose)
        return EventStream(await anext(events), events, cleanup.pop_all(), TYPED)


class ResponseStream:
    """A submitted request's way back to its client."""

    def __init__(self, asked: ActiveRequest, said: dict[str, Any]):
        self.stream = asked.form.stream
        self._asked, self._said = asked, said
        self._created = int(time.time())
        self._items = Items()

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        async for step in self._asked.steps():
            for _ in self._items.add(step):
                pass
        return self._object()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as events, numbered; the first comes with the engine's first step."""
        number = 0
        async for event in self._unnumbered():
            yield {**event, "sequence_number": number}
            number += 1

    async def _unnumbered(self) -> AsyncIterator[dict[str, Any]]:
        begun = False
        async for step in self._asked.steps():
            if not begun:
                begun = True
                for name in ("created", "in_progress"):
                    yield {"type": f"response.{name}", "response": self._object()}
            for event in self._items.add(step):
                yield event
        response = self._object()
        yield {"type": f"response.{response['status']}", "response": response}

    def _object(self) -> dict[str, Any]:
        reason = self._items.finish_reason
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        defaults = {"parallel_tool_calls": self._asked.form.parallel, "tool_choice": "auto", "tools": [], "metadata": {}}
        return {
            "id": f"resp_{self._asked.record.id}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": None,
            "model": self._asked.service.name,
            "output": self._items.done,
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            **defaults,
            **self._said,
            "usage": self._usage() if reason else None,
        }

    def _usage(self) -> dict[str, Any]:
        record = self._asked.record
        return {
            "input_tokens": record.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": record.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": record.reasoning_tokens},
            "total_tokens": record.prompt_tokens + record.completion_tokens,
        }


class Items:
    """An answer's output items, and the events that tell of them."""

    def __init__(self):
        self.done: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self._open: dict[str, Any] | None = None

    def add(self, step: OutputStep) -> Iterator[dict[str, Any]]:
        """One more step."""
        for part in step.parts:
            yield from self._add(part)
        if step.finish_reason is not None:
            self.finish_reason = step.finish_reason
            yield from self._close("incomplete" if step.finish_reason == "length" else "completed")

    def _add(self, part: Part) -> Iterator[dict[str, Any]]:
        if isinstance(part, ToolCall):
            yield from self._close()
            yield from self._call(part)
            return
        kind = "reasoning" if isinstance(part, Reasoning) else "message"
        if self._open is not None and self._open["type"] != kind:
            yield from self._close()
        if self._open is None:
            yield from self._begin(kind)
        content = self._open["content"][0]
        content["text"] += part.text
        yield self._event(f"{_text_event(kind)}.delta", delta=part.text, **_logprobs(kind))

    def _begin(self, kind: str) -> Iterator[dict[str, Any]]:
        if kind == "message":
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._open = {"id": _id("msg"), "type": kind, "role": "assistant", "status": "in_progress", "content": [content]}
        else:
            content = {"type": "reasoning_text", "text": ""}
            self._open = {"id": _id("rs"), "type": kind, "status": "in_progress", "summary": [], "content": [content]}
        empty = {**self._open, "content": []}
        yield {"type": "response.output_item.added", "output_index": len(self.done), "item": empty}
        yield self._event("response.content_part.added", part=dict(content))

    def _close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        if self._open is None:
            return
        item, content = self._open, self._open["content"][0]
        yield self._event(f"{_text_event(item['type'])}.done", text=content["text"], **_logprobs(item["type"]))
        yield self._event("response.content_part.done", part=dict(content))
        item["status"], self._open = status, None
        yield from self._finished(item)

    def _finished(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.done.append(item)
        yield {"type": "response.output_item.done", "output_index": len(self.done) - 1, "item": item}

    def _call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        item = {"id": _id("fc"), "type": "function_call", "call_id": _id("call"), "name": call.name, "arguments": ""}
        where = {"item_id": item["id"], "output_index": len(self.done)}
        added = {**item, "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": len(self.done), "item": added}
        yield {"type": "response.function_call_arguments.delta", **where, "delta": call.arguments}
        yield {"type": "response.function_call_arguments.done", **where, "name": call.name, "arguments": call.arguments}
        yield from self._finished({**item, "arguments": call.arguments, "status": "completed"})

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """An event about the first content part of the open item."""
        return {"type": kind, "item_id": self._open["id"], "output_index": len(self.done), "content_index": 0, **fields}


def _text_event(kind: str) -> str:
    return "response.reasoning_text" if kind == "reasoning" else "response.output_text"


def _logprobs(kind: str) -> dict[str, Any]:
    return {"logprobs": []} if kind == "message" else {}


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:24]}"
