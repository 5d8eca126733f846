"""OpenAI's chat completion objects."""

import dataclasses
import time
import uuid
from collections.abc import Iterable
from typing import Any

from minicpmv46_jax.generation.detokenize import Detokenizer
from minicpmv46_jax.generation.generate import Token
from serve.api.common.middleware import RequestRecord
from serve.api.common.output_stream import CollectedOutput
from serve.parsers import Content, Part, Reasoning

LOWEST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON lacks


@dataclasses.dataclass(frozen=True)
class Header:
    """What all objects of one answer repeat."""

    id: str
    model: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def completion(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """Whole answers."""
        return {**self._fields("chat.completion"), "choices": choices, "usage": usage}

    def choice(self, index: int, whole: CollectedOutput, logprobs: dict | None) -> dict[str, Any]:
        """One of them."""
        return {"index": index, "message": message(whole), "logprobs": logprobs, "finish_reason": whole.finish_reason}

    def chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: dict | None = None
    ) -> dict[str, Any]:
        """A piece of a streamed answer."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._fields("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk after the last piece, for those who asked for it."""
        return {**self._fields("chat.completion.chunk"), "choices": [], "usage": usage}

    def _fields(self, object_: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_, "created": self.created, "model": self.model}


def message(whole: CollectedOutput) -> dict[str, Any]:
    """An assistant's message. One that only calls has no content; reasoning and calls are named only where there are any."""
    out: dict[str, Any] = {"role": "assistant", "content": None if whole.calls and not whole.content else whole.content}
    if whole.reasoning:
        out["reasoning_content"] = whole.reasoning
    if whole.calls:
        out["tool_calls"] = [
            {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in whole.calls
        ]
    return {**out, "refusal": None}


def deltas_of(part: Part, calls: int) -> list[dict[str, Any]]:
    """What a stream says of a part. `calls`: those before it. A call comes as OpenAI's do: who is called, then with what."""
    if isinstance(part, Content):
        return [{"content": part.text}]
    if isinstance(part, Reasoning):
        return [{"reasoning_content": part.text}]
    head = {"index": calls, "id": call_id(), "type": "function", "function": {"name": part.name, "arguments": ""}}
    return [{"tool_calls": [head]}, {"tool_calls": [{"index": calls, "function": {"arguments": part.arguments}}]}]


def call_id() -> str:
    """A name for a call, by which its result will be known."""
    return f"call_{uuid.uuid4().hex[:24]}"


def usage(record: RequestRecord) -> dict[str, Any]:
    """OpenAI's account of a request."""
    prompt, completion, reasoning = record.prompt_tokens, record.completion_tokens, record.reasoning_tokens
    details = {"completion_tokens_details": {"reasoning_tokens": reasoning}} if reasoning else {}
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **details}


def logprobs(tokens: Iterable[Token], detokenizer: Detokenizer) -> dict[str, Any]:
    """Every token with its log probability and the alternatives asked for."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = detokenizer.token_bytes(token_id)
        text = raw.decode("utf-8", "replace")  # part of a character has no text; its bytes tell
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(raw)}

    content = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*alternative) for alternative in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}
