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

LOWEST_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON lacks


@dataclasses.dataclass(frozen=True)
class Header:
    """The fields that all objects of one response repeat."""

    id: str
    model: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def completion(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """Returns a chat completion."""
        return {**self._fields("chat.completion"), "choices": choices, "usage": usage}

    def choice(self, index: int, output: CollectedOutput, logprobs: dict | None) -> dict[str, Any]:
        """Returns a choice of a chat completion."""
        return {"index": index, "message": message(output), "logprobs": logprobs, "finish_reason": output.finish_reason}

    def chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: dict | None = None
    ) -> dict[str, Any]:
        """Returns a chunk of a stream."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._fields("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the final chunk of a stream with `include_usage`."""
        return {**self._fields("chat.completion.chunk"), "choices": [], "usage": usage}

    def _fields(self, object_: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_, "created": self.created, "model": self.model}


def message(output: CollectedOutput) -> dict[str, Any]:
    """Returns an assistant message. Reasoning and calls are absent if empty; content is null if there are
    only calls."""
    content = None if output.calls and not output.content else output.content
    out: dict[str, Any] = {"role": "assistant", "content": content}
    if output.reasoning:
        out["reasoning_content"] = output.reasoning
    if output.calls:
        out["tool_calls"] = [
            {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in output.calls
        ]
    return {**out, "refusal": None}


def deltas_of(part: Part, num_calls: int) -> list[dict[str, Any]]:
    """Returns the deltas of a part. A call has two, as OpenAI's: the function, then the arguments.

    Args:
      part: the part.
      num_calls: number of calls before it.
    """
    if isinstance(part, Content):
        return [{"content": part.text}]
    if isinstance(part, Reasoning):
        return [{"reasoning_content": part.text}]
    head = {"index": num_calls, "id": call_id(), "type": "function", "function": {"name": part.name, "arguments": ""}}
    return [{"tool_calls": [head]}, {"tool_calls": [{"index": num_calls, "function": {"arguments": part.arguments}}]}]


def call_id() -> str:
    """Returns a new id for a call; the client sends it back with the call's result."""
    return f"call_{uuid.uuid4().hex[:24]}"


def usage(record: RequestRecord) -> dict[str, Any]:
    """Returns OpenAI's usage object."""
    prompt, completion, reasoning = record.prompt_tokens, record.completion_tokens, record.reasoning_tokens
    details = {"completion_tokens_details": {"reasoning_tokens": reasoning}} if reasoning else {}
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **details}


def logprobs(tokens: Iterable[Token], detokenizer: Detokenizer) -> dict[str, Any]:
    """Returns the log probability of every token and of its alternatives, in the chat format."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = detokenizer.token_bytes(token_id)
        text = raw.decode("utf-8", "replace")  # part of a character has no text; `bytes` has it
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(raw)}

    content = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*alternative) for alternative in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}
