"""Parser of one answer: splits off reasoning, then tool calls, then restores line breaks in the content."""

from serve.parsers.calls import Tools
from serve.parsers.newlines import NewlineParser
from serve.parsers.parts import Content, Part, ToolCall
from serve.parsers.reasoning import ReasoningParser
from serve.parsers.tools import ToolParser


class OutputParser:
    """A parser for one answer: call `push` with each piece of text, then `finish`.

    Args:
      thinking: True if the prompt ends inside `<think>`.
      tools: the functions that may be called: the JSON schema of each one's parameters, by name.
      parallel: True if the answer may have several calls.
      restore_newlines: True to apply newlines.py to the content.
    """

    def __init__(self, thinking: bool = False, tools: Tools | None = None, parallel: bool = True, restore_newlines: bool = False):
        self._reasoning = ReasoningParser(thinking)
        self._tools = ToolParser(tools or {}, parallel)
        self._newlines = NewlineParser() if restore_newlines else None

    @property
    def thinking(self) -> bool:
        """True while the next text is reasoning."""
        return self._reasoning.thinking

    @property
    def ended(self) -> bool:
        """True once the answer is complete; any later text is ignored."""
        return self._tools.ended

    def push(self, text: str) -> list[Part]:
        """Returns the parts that this piece of text completes, often none."""
        return self._restore_newlines(self._split_calls(self._reasoning.push(text)))

    def finish(self) -> list[Part]:
        """Returns the parts that are still buffered at the end of the text."""
        parts = self._restore_newlines([*self._split_calls(self._reasoning.finish()), *self._tools.finish()])
        return [*parts, *self._flush_newlines()]

    def _split_calls(self, parts: list[Part]) -> list[Part]:
        out: list[Part] = []
        for part in parts:
            out += self._tools.push(part.text) if isinstance(part, Content) else [part]
        return out

    def _restore_newlines(self, parts: list[Part]) -> list[Part]:
        if self._newlines is None:
            return parts
        out: list[Part] = []
        for part in parts:
            if isinstance(part, Content):
                out += _content(self._newlines.push(part.text))
            else:
                out += [*self._flush_newlines(), part] if isinstance(part, ToolCall) else [part]
        return out

    def _flush_newlines(self) -> list[Part]:
        """Returns the buffered text: text before a call does not depend on text after it."""
        return [] if self._newlines is None else _content(self._newlines.finish())


def _content(text: str) -> list[Part]:
    return [Content(text)] if text else []
