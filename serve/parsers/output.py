"""An answer from its text to its parts: reasoning first, then tool calls in what is left, then line breaks in what is text."""

from serve.parsers.calls import Tools
from serve.parsers.newlines import NewlineParser
from serve.parsers.parts import Content, Part, ToolCall
from serve.parsers.reasoning import ReasoningParser
from serve.parsers.tools import ToolParser


class OutputParser:
    """One answer's. Feed it with `push`, end with `finish`.

    Args:
      thinking: whether the prompt ends inside `<think>`.
      tools: the functions on offer, their parameters' schemas by name.
      parallel: whether there may be several calls.
      restore_newlines: see newlines.py.
    """

    def __init__(self, thinking: bool = False, tools: Tools | None = None, parallel: bool = True, restore_newlines: bool = False):
        self._reasoning = ReasoningParser(thinking)
        self._tools = ToolParser(tools or {}, parallel)
        self._newlines = NewlineParser() if restore_newlines else None

    @property
    def thinking(self) -> bool:
        """Whether what comes next is thought."""
        return self._reasoning.thinking

    @property
    def ended(self) -> bool:
        """Whether nothing that may follow belongs to the answer."""
        return self._tools.ended

    def push(self, text: str) -> list[Part]:
        """What this piece of text makes certain, often nothing."""
        return self._restored(self._called(self._reasoning.push(text)))

    def finish(self) -> list[Part]:
        """What was held back."""
        parts = self._restored([*self._called(self._reasoning.finish()), *self._tools.finish()])
        return [*parts, *self._flushed()]

    def _called(self, parts: list[Part]) -> list[Part]:
        out: list[Part] = []
        for part in parts:
            out += self._tools.push(part.text) if isinstance(part, Content) else [part]
        return out

    def _restored(self, parts: list[Part]) -> list[Part]:
        if self._newlines is None:
            return parts
        out: list[Part] = []
        for part in parts:
            if isinstance(part, Content):
                out += _content(self._newlines.push(part.text))
            else:
                out += [*self._flushed(), part] if isinstance(part, ToolCall) else [part]
        return out

    def _flushed(self) -> list[Part]:
        """Text before a call does not wait for text after it."""
        return [] if self._newlines is None else _content(self._newlines.finish())


def _content(text: str) -> list[Part]:
    return [Content(text)] if text else []
