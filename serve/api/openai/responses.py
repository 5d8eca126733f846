"""POST /v1/responses: OpenAI's newer API, without state: each request has the whole conversation."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve.api.common.errors import ApiError
from serve.api.common.json_encoding import encode_json
from serve.api.common.request_pipeline import ActiveRequest, ParsedRequest, PreparedRequest, prepare_chat
from serve.api.common.respond import respond
from serve.api.common.service import Service
from serve.api.common.sse import TYPED
from serve.api.common.typed_events import BlockBuilder, Event, TypedStream
from serve.api.openai.responses_request import parse_response
from serve.parsers import ToolCall
from serve.runtime.budget import RequestMemory

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
MAX_ECHOED_BYTES = 2**20


@router.post("/responses")
async def responses(request: Request) -> Response:
    """Generates the response to a conversation, as one object or as typed events."""
    echoed: dict[str, Any] = {}

    def parse(body: bytes) -> ParsedRequest:
        parsed, raw = parse_response(body)
        echoed.update(echoed_fields(raw))
        return parsed

    async def prepare(service: Service, body: bytes, memory: RequestMemory) -> PreparedRequest:
        return await prepare_chat(service, parse, body, memory)

    return await respond(request, prepare, lambda active: ResponseStream(active, echoed), TYPED)


def echoed_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the client's fields that the response repeats.

    Raises ApiError if they are long: they are kept during generation, and a stream repeats them three times.
    """
    echoed = {name: raw[name] for name in _ECHOED if name in raw}
    if (size := len(encode_json(echoed))) > MAX_ECHOED_BYTES:
        longest = max(echoed, key=lambda name: len(encode_json(echoed[name])))
        message = (
            f"{longest} is too long: the fields that a response repeats have {size} bytes, at most {MAX_ECHOED_BYTES} may be"
        )
        raise ApiError(400, message, longest)
    return echoed


class ResponseStream(TypedStream):
    """The output of a submitted request in the format of the Responses API.

    Args:
      request: the submitted request.
      echoed: the client's fields that the response repeats.
    """

    def __init__(self, request: ActiveRequest, echoed: dict[str, Any]):
        super().__init__(request, OutputItems())
        self._echoed = echoed
        self._created = int(time.time())

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yields the response as numbered events."""
        number = 0
        async for event in super().events():
            yield {**event, "sequence_number": number}
            number += 1

    def start_events(self) -> list[Event]:
        """Returns response.created and response.in_progress, with a response without output."""
        return [{"type": f"response.{name}", "response": self.response()} for name in ("created", "in_progress")]

    def end_events(self) -> list[Event]:
        """Returns response.completed or response.incomplete, with the whole response."""
        response = self.response()
        return [{"type": f"response.{response['status']}", "response": response}]

    def response(self) -> dict[str, Any]:
        """Returns the response object as of now."""
        reason = self._blocks.finish_reason
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        parallel = self._request.output.parallel_tool_calls
        defaults = {"parallel_tool_calls": parallel, "tool_choice": "auto", "tools": [], "metadata": {}}
        return {
            "id": f"resp_{self._request.record.id}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": None,
            "model": self._request.service.name,
            "output": list(self._blocks.done),
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            **defaults,
            **self._echoed,
            "usage": self._usage() if reason else None,
        }

    def _usage(self) -> dict[str, Any]:
        record = self._request.record
        return {
            "input_tokens": record.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": record.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": record.reasoning_tokens},
            "total_tokens": record.prompt_tokens + record.completion_tokens,
        }


class OutputItems(BlockBuilder):
    """A builder of a response's output items."""

    text_type, reasoning_type = "message", "reasoning"

    def new_block(self, kind: str) -> dict[str, Any]:
        """Returns an empty message or reasoning item."""
        if kind == "message":
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            return {"id": _id("msg"), "type": kind, "role": "assistant", "status": "in_progress", "content": [content]}
        content = {"type": "reasoning_text", "text": ""}
        return {"id": _id("rs"), "type": kind, "status": "in_progress", "summary": [], "content": [content]}

    def start_events(self, block: dict[str, Any]) -> Iterator[Event]:
        """Yields the events that add an item and its content part."""
        yield {"type": "response.output_item.added", "output_index": len(self.done), "item": {**block, "content": []}}
        yield self._event(block, "response.content_part.added", part=dict(block["content"][0]))

    def text_event(self, block: dict[str, Any], text: str) -> Event:
        """Appends text to an item and returns its delta event."""
        block["content"][0]["text"] += text
        return self._event(block, f"{_text_event(block)}.delta", delta=text, **_no_logprobs(block))

    def end_events(self, block: dict[str, Any]) -> Iterator[Event]:
        """Appends an item to `done` and yields the events that complete its text, its content part and
        itself."""
        content = block["content"][0]
        yield self._event(block, f"{_text_event(block)}.done", text=content["text"], **_no_logprobs(block))
        yield self._event(block, "response.content_part.done", part=dict(content))
        block["status"] = "incomplete" if self.finish_reason == "length" else "completed"
        yield self._done_event(block)

    def call_events(self, call: ToolCall) -> Iterator[Event]:
        """Appends a function_call item to `done` and yields its events."""
        item = {"id": _id("fc"), "type": "function_call", "call_id": _id("call"), "name": call.name, "arguments": ""}
        position = {"item_id": item["id"], "output_index": len(self.done)}
        added = {**item, "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": len(self.done), "item": added}
        yield {"type": "response.function_call_arguments.delta", **position, "delta": call.arguments}
        yield {"type": "response.function_call_arguments.done", **position, "name": call.name, "arguments": call.arguments}
        yield self._done_event({**item, "arguments": call.arguments, "status": "completed"})

    def _done_event(self, item: dict[str, Any]) -> Event:
        self.done.append(item)
        return {"type": "response.output_item.done", "output_index": len(self.done) - 1, "item": item}

    def _event(self, block: dict[str, Any], kind: str, **fields: Any) -> Event:
        """Returns an event about the content part of the open item."""
        return {"type": kind, "item_id": block["id"], "output_index": len(self.done), "content_index": 0, **fields}


def _text_event(block: dict[str, Any]) -> str:
    return "response.reasoning_text" if block["type"] == "reasoning" else "response.output_text"


def _no_logprobs(block: dict[str, Any]) -> dict[str, Any]:
    return {"logprobs": []} if block["type"] == "message" else {}


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:24]}"
