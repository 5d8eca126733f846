"""The output of one choice: the engine's deltas, parsed into steps, merged over choices, or collected."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

from minicpmv46_jax.generation.detokenize import Detokenizer
from minicpmv46_jax.generation.generate import Token
from minicpmv46_jax.library import Delta
from serve.parsers import Content, OutputParser, Part, Reasoning, ToolCall
from serve.parsers.reasoning import CLOSE

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class OutputStep:
    """A parsed delta.

    Attributes:
      parts: parts of the answer that became complete.
      tokens: tokens decoded since the previous step; their text may come with a later step.
      num_reasoning_tokens: the number of them that are reasoning tokens.
      finish_reason: None until the last step; then "stop", "length" or "tool_calls".
    """

    parts: tuple[Part, ...]
    tokens: tuple[Token, ...]
    num_reasoning_tokens: int
    finish_reason: str | None = None


async def output_steps(
    deltas: AsyncIterator[Delta], parser: OutputParser, detokenizer: Detokenizer, include_reasoning: bool
) -> AsyncIterator[OutputStep]:
    """Yields the steps of one choice. They may end before the deltas do; the caller closes the request's
    handle."""
    any_call = False
    async for delta in deltas:
        was_thinking = parser.thinking
        parts = parser.push(delta.text)
        num_reasoning_tokens = _reasoning_tokens(delta.tokens, was_thinking, parser.thinking, detokenizer)
        if delta.finish_reason is not None or parser.ended:
            parts += parser.finish()
        any_call = any_call or any(isinstance(part, ToolCall) for part in parts)
        shown = tuple(part for part in parts if include_reasoning or not isinstance(part, Reasoning))
        reason = _finish_reason("stop" if parser.ended else delta.finish_reason, any_call)
        yield OutputStep(shown, delta.tokens, num_reasoning_tokens, reason)
        if parser.ended:
            return


def _reasoning_tokens(tokens: tuple[Token, ...], before: bool, after: bool, detokenizer: Detokenizer) -> int:
    """Returns the number of reasoning tokens in a step, the closing `</think>` included.

    Args:
      tokens: the step's tokens.
      before: True if the step began inside reasoning.
      after: True if it ended inside reasoning.
      detokenizer: the model's detokenizer.
    """
    if not before and not after:
        return 0
    if after:
        return len(tokens)
    closing = (i for i, token in enumerate(tokens, 1) if detokenizer.token_bytes(token.id) == CLOSE.encode())
    return next(closing, len(tokens))


def _finish_reason(reason: str | None, any_call: bool) -> str | None:
    return "tool_calls" if reason == "stop" and any_call else reason


async def merged(streams: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yields (index of the choice, its next entry) in order of arrival."""
    if len(streams) == 1:
        async for entry in streams[0]:
            yield 0, entry
        return
    pending = {asyncio.ensure_future(anext(stream, None)): i for i, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = pending.pop(task)
                if (entry := task.result()) is not None:
                    yield index, entry
                    pending[asyncio.ensure_future(anext(streams[index], None))] = index
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


@dataclasses.dataclass
class CollectedOutput:
    """The collected steps of one choice."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = dataclasses.field(default_factory=list)
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def add(self, step: OutputStep) -> None:
        """Appends a step."""
        for part in step.parts:
            if isinstance(part, Content):
                self.content += part.text
            elif isinstance(part, Reasoning):
                self.reasoning += part.text
            else:
                self.calls.append(part)
        self.tokens += step.tokens
        self.finish_reason = step.finish_reason
