"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

import json
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve.api.anthropic.messages_request import parse_message
from serve.api.common.media_limits import check_media
from serve.api.common.middleware import request_record
from serve.api.common.request_pipeline import (
    ActiveRequest,
    ParsedRequest,
    PreparedRequest,
    check_model,
    client_errors,
    measure_prompt,
    plan_prompt,
    prepare_body,
    prepare_chat,
)
from serve.api.common.respond import respond
from serve.api.common.service import Service
from serve.api.common.sse import ANTHROPIC
from serve.api.common.typed_events import BlockBuilder, Event, TypedStream
from serve.parsers import ToolCall
from serve.runtime.budget import RequestMemory

router = APIRouter()

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@router.post("/messages")
async def messages(request: Request) -> Response:
    """Generates the next message of a conversation, as one object or as named events."""
    return await respond(request, _prepare, MessageStream, ANTHROPIC)


async def _prepare(service: Service, body: bytes, memory: RequestMemory) -> PreparedRequest:
    return await prepare_chat(service, parse_message, body, memory)


@router.post("/messages/count_tokens")
async def count_tokens(request: Request) -> dict[str, int]:
    """Counts the tokens of a prompt, images included. Images are measured and not decoded."""
    async with AsyncExitStack() as cleanup:
        number, _ = await prepare_body(request, cleanup, _count_tokens)
    request_record(request).prompt_tokens = number
    return {"input_tokens": number}


async def _count_tokens(service: Service, body: bytes, memory: RequestMemory) -> int:
    parsed = await service.run_check(_check_count, service, body, size=len(body))
    with client_errors(parsed):
        plan = await service.run_in_thread(plan_prompt, service, parsed.request, size=len(body))
        _, number = await measure_prompt(service, plan, memory, check=lambda number: None)
    return number


def _check_count(service: Service, body: bytes) -> ParsedRequest:
    parsed = parse_message(body, counting=True)
    with client_errors(parsed):
        check_model(service, parsed.request.model)
        check_media(parsed.request.messages, service.media_limits)
    return parsed


class MessageStream(TypedStream):
    """The output of a submitted request in Anthropic's format."""

    def __init__(self, request: ActiveRequest):
        super().__init__(request, ContentBlocks())

    def response(self) -> dict[str, Any]:
        """Returns the message with all its content blocks."""
        return {**self._head(self._blocks.done), **self._stop_fields(), "usage": self._usage()}

    def start_events(self) -> list[Event]:
        """Returns message_start, with an empty message."""
        usage = {**self._usage(), "output_tokens": 0}
        message = {**self._head([]), "stop_reason": None, "stop_sequence": None, "usage": usage}
        return [{"type": "message_start", "message": message}]

    def end_events(self) -> list[Event]:
        """Returns message_delta, with stop reason and usage, and message_stop."""
        delta = {"type": "message_delta", "delta": self._stop_fields(), "usage": self._usage()}
        return [delta, {"type": "message_stop"}]

    def _head(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        name = self._request.service.name
        return {"id": f"msg_{self._request.record.id}", "type": "message", "role": "assistant", "model": name, "content": content}

    def _stop_fields(self) -> dict[str, Any]:
        reason = self._output.finish_reason
        sequence = self._stop_sequence() if reason == "stop" else None
        return {"stop_reason": "stop_sequence" if sequence else _STOP_REASONS[reason], "stop_sequence": sequence}

    def _stop_sequence(self) -> str | None:
        """Returns the stop text that ended the answer. It is found in the tokens, because the text ends
        before it."""
        if not self._request.stop:
            return None
        text = self._request.service.model.detokenizer.decode([token.id for token in self._output.tokens])
        found = [(text.find(stop), stop) for stop in self._request.stop if stop in text]
        return min(found)[1] if found else None

    def _usage(self) -> dict[str, int]:
        record = self._request.record
        cached = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        return {"input_tokens": record.prompt_tokens, "output_tokens": record.completion_tokens, **cached}


class ContentBlocks(BlockBuilder):
    """A builder of a message's content blocks."""

    text_type, reasoning_type = "text", "thinking"

    def new_block(self, kind: str) -> dict[str, Any]:
        """Returns an empty text or thinking block."""
        return {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}

    def start_events(self, block: dict[str, Any]) -> Iterator[Event]:
        """Yields content_block_start."""
        yield self._event("start", content_block=dict(block))

    def text_event(self, block: dict[str, Any], text: str) -> Event:
        """Appends text to a block and returns its content_block_delta."""
        kind = block["type"]
        block[kind] += text
        return self._event("delta", delta={"type": f"{kind}_delta", kind: text})

    def end_events(self, block: dict[str, Any]) -> Iterator[Event]:
        """Appends a block to `done` and yields content_block_stop."""
        yield self._event("stop")
        self.done.append(block)

    def call_events(self, call: ToolCall) -> Iterator[Event]:
        """Appends a tool_use block to `done` and yields its events."""
        block = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": call.name, "input": {}}
        yield self._event("start", content_block=dict(block))
        yield self._event("delta", delta={"type": "input_json_delta", "partial_json": call.arguments})
        yield from self.end_events({**block, "input": json.loads(call.arguments)})

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": f"content_block_{kind}", "index": len(self.done), **fields}
