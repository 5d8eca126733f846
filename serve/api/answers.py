"""OpenAI's chat completion objects."""

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from minicpmv46_jax.detokenize import Detokenizer
from minicpmv46_jax.generate import Token

LOWEST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON lacks


@dataclasses.dataclass(frozen=True)
class Header:
    """What all objects of one answer repeat."""

    id: str
    model: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def completion(self, text: str, finish_reason: str, logprobs: dict | None, usage: dict[str, int]) -> dict[str, Any]:
        """A whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._fields("chat.completion"), "choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None, logprobs: dict | None = None) -> dict[str, Any]:
        """A piece of a streamed answer."""
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._fields("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk after the last piece, for those who asked for it."""
        return {**self._fields("chat.completion.chunk"), "choices": [], "usage": usage}

    def _fields(self, object_: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_, "created": self.created, "model": self.model}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's account of a request."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


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
