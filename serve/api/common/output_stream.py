"""One of the answers to a request: the engine's steps taken apart into what clients are told."""

import dataclasses
from collections.abc import AsyncIterator

from minicpmv46_jax.generation.detokenize import Detokenizer
from minicpmv46_jax.generation.generate import Token
from minicpmv46_jax.library import Delta
from serve.parsers import Content, OutputParser, Part, Reasoning, ToolCall
from serve.parsers.reasoning import CLOSE


@dataclasses.dataclass(frozen=True)
class OutputStep:
    """What became known at once.

    Attributes:
      parts: of the answer.
      tokens: those decoded since the step before; their text may come with a later step.
      thought: how many of them were spent on thinking.
      finish_reason: None until the last step; then "stop", "length" or "tool_calls".
    """

    parts: tuple[Part, ...]
    tokens: tuple[Token, ...]
    thought: int
    finish_reason: str | None = None


async def steps(
    deltas: AsyncIterator[Delta], parser: OutputParser, detokenizer: Detokenizer, include_reasoning: bool
) -> AsyncIterator[OutputStep]:
    """An answer step by step. It may end before the deltas do: closing their job is the caller's."""
    called = False
    async for delta in deltas:
        thinking = parser.thinking
        parts = parser.push(delta.text)
        thought = _thought(delta.tokens, thinking, parser.thinking, detokenizer)
        if delta.finish_reason is not None or parser.ended:
            parts += parser.finish()
        called = called or any(isinstance(part, ToolCall) for part in parts)
        shown = tuple(part for part in parts if include_reasoning or not isinstance(part, Reasoning))
        yield OutputStep(shown, delta.tokens, thought, _reason("stop" if parser.ended else delta.finish_reason, called))
        if parser.ended:
            return


def _thought(tokens: tuple[Token, ...], before: bool, after: bool, detokenizer: Detokenizer) -> int:
    """The tokens of a step that were thought; the one that closes it counts."""
    if not before and not after:
        return 0
    if after:
        return len(tokens)
    closed = (i for i, token in enumerate(tokens, 1) if detokenizer.token_bytes(token.id) == CLOSE.encode())
    return next(closed, len(tokens))


def _reason(reason: str | None, called: bool) -> str | None:
    return "tool_calls" if reason == "stop" and called else reason


@dataclasses.dataclass
class CollectedOutput:
    """An answer that has ended, collected."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = dataclasses.field(default_factory=list)
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def add(self, step: OutputStep) -> None:
        """One more step."""
        for part in step.parts:
            if isinstance(part, Content):
                self.content += part.text
            elif isinstance(part, Reasoning):
                self.reasoning += part.text
            else:
                self.calls.append(part)
        self.tokens += step.tokens
        self.finish_reason = step.finish_reason
