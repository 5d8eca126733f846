"""Finds tool calls in streamed text.

A call is returned once it is complete, because only then is its text known to be a call. Several calls are
returned one by one. Text that turns out not to be a call stays in the content unchanged. White space around
calls is dropped.
"""

from serve.parsers.calls import Tools, ends_inside_parameter, may_begin_call, parse_call
from serve.parsers.parts import Content, Part, ToolCall, partial_overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolParser:
    """A parser that splits text into `Content` and `ToolCall`.

    Args:
      tools: the functions that may be called. Without any, all text is content.
      parallel: True if several calls may come. Otherwise the answer ends after the first.
    """

    def __init__(self, tools: Tools, parallel: bool = True):
        self.ended = False
        self._tools, self._parallel = tools, parallel
        self._buffer = self._pending_space = ""
        self._inside_call = self._any_call = False
        self._searched = 0  # characters of an open call that have been searched for its closing tag

    def push(self, text: str) -> list[Part]:
        """Returns the parts that this piece of text completes."""
        if not self._tools:
            return [Content(text)] if text else []
        self._buffer += text
        return self._run(final=False)

    def finish(self) -> list[Part]:
        """Returns the parts that are still buffered. A call may lack its closing tag."""
        parts = self._run(final=True)
        if self._pending_space and not self._any_call:
            parts.append(Content(self._pending_space))
        return parts

    def _run(self, final: bool) -> list[Part]:
        parts: list[Part] = []
        progress = True
        while progress and not self.ended:
            progress, found = self._take_call(final) if self._inside_call else self._take_text(final)
            parts += found
        return parts

    def _take_text(self, final: bool) -> tuple[bool, list[Part]]:
        """Takes the text before the next opening tag. Returns (whether a tag was found, parts)."""
        at = self._buffer.find(OPEN)
        self._inside_call = at >= 0
        end = at if self._inside_call else len(self._buffer) - (0 if final else partial_overlap(self._buffer, OPEN))
        parts = self._content(self._buffer[:end])
        self._buffer = self._buffer[end + len(OPEN) if self._inside_call else end :]
        self._searched = 0
        return self._inside_call, parts

    def _content(self, text: str) -> list[Part]:
        """Returns text as content. Trailing white space stays buffered, because a call after it drops it."""
        text = self._pending_space + text
        stripped = text.rstrip()
        self._pending_space = text[len(stripped) :]
        return [Content(stripped)] if stripped else []

    def _take_call(self, final: bool) -> tuple[bool, list[Part]]:
        """Takes a call if it is complete. Returns (whether the buffer was decided, parts)."""
        if not may_begin_call(self._buffer):
            return True, self._reject_call()
        while (at := self._buffer.find(CLOSE, self._searched)) >= 0:
            if call := parse_call(self._buffer[:at], self._tools):
                return True, self._accept_call(call, at + len(CLOSE))
            self._searched = at + len(CLOSE)
            if not _ends_inside_value(self._buffer[:at]):
                return True, self._reject_call()
        if final:
            call = parse_call(self._buffer, self._tools)
            return True, self._accept_call(call, len(self._buffer)) if call else self._reject_call()
        self._searched = max(self._searched, len(self._buffer) - len(CLOSE))
        return False, []

    def _accept_call(self, call: ToolCall, end: int) -> list[Part]:
        self._buffer, self._pending_space = self._buffer[end:], ""
        self._inside_call, self._any_call = False, True
        self.ended = not self._parallel
        return [call]

    def _reject_call(self) -> list[Part]:
        """Returns the opening tag as content. The text after it is searched again for a call."""
        self._inside_call = False
        return self._content(OPEN)


def _ends_inside_value(text: str) -> bool:
    """Returns whether a closing tag after `text` would be part of an argument."""
    if not text.lstrip().startswith("{"):
        return ends_inside_parameter(text)
    quotes = text.replace("\\\\", "").replace('\\"', "").count('"')
    return quotes % 2 == 1
