"""Splits reasoning from the answer.

The prompt decides whether an answer starts inside `<think>`: the template of a thinking checkpoint opens the
tag, and the template of an instruct checkpoint closes an empty one. A `<think>` at the start of the answer
opens reasoning too. Line breaks next to the tags are dropped.
"""

from serve.parsers.parts import Content, Part, Reasoning, partial_overlap

OPEN, CLOSE = "<think>", "</think>"


class ReasoningParser:
    """A parser that splits one answer into `Reasoning` and `Content`.

    Args:
      thinking: True if the prompt ends inside `<think>`.
    """

    def __init__(self, thinking: bool):
        self.thinking = thinking  # True while the next text is reasoning, as far as the text so far shows
        self._buffer = ""
        self._state = self._start

    def push(self, text: str) -> list[Part]:
        """Returns the parts that this piece of text completes."""
        self._buffer += text
        return self._run(final=False)

    def finish(self) -> list[Part]:
        """Returns the parts that are still buffered at the end of the text."""
        return self._run(final=True)

    def _run(self, final: bool) -> list[Part]:
        parts: list[Part] = []
        state = None
        while state != self._state:  # until the state no longer changes
            state = self._state
            parts += state(final)
        return parts

    def _take(self, length: int) -> str:
        out, self._buffer = self._buffer[:length], self._buffer[length:]
        return out

    def _start(self, final: bool) -> list[Part]:
        """Handles the start of the answer, where an opening tag may come."""
        text = self._buffer.lstrip()
        if text.startswith(OPEN):
            self._take(len(self._buffer) - len(text) + len(OPEN))
            self.thinking, self._state = True, self._opened
        elif final or not OPEN.startswith(text):
            self._state = self._opened if self.thinking else self._content
        return []

    def _opened(self, final: bool) -> list[Part]:
        """Drops line breaks after the opening tag."""
        self._buffer = self._buffer.lstrip("\r\n")
        if self._buffer:
            self._state = self._reasoning
        return []

    def _reasoning(self, final: bool) -> list[Part]:
        at = self._buffer.find(CLOSE)
        if at >= 0:
            text = self._take(at).rstrip()
            self._take(len(CLOSE))
            self.thinking, self._state = False, self._closed
        else:
            end = len(self._buffer) - partial_overlap(self._buffer, CLOSE)
            text = self._take(len(self._buffer) if final else len(self._buffer[:end].rstrip()))
        return [Reasoning(text)] if text else []

    def _closed(self, final: bool) -> list[Part]:
        """Drops line breaks after the closing tag."""
        self._buffer = self._buffer.lstrip("\r\n")
        if self._buffer:
            self._state = self._content
        return []

    def _content(self, final: bool) -> list[Part]:
        text = self._take(len(self._buffer))
        return [Content(text)] if text else []
