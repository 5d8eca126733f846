"""Reasoning and answer told apart.

Whether an answer starts inside `<think>` is the prompt's to say: the template of a thinking checkpoint opens it, the instruct one
closes an empty one. A model that opens one itself, as the first thing it writes, is understood as well. Line breaks around the
marks belong to them.
"""

from serve.parsers.parts import Content, Part, Reasoning, overlap

OPEN, CLOSE = "<think>", "</think>"


class ReasoningParser:
    """Splits an answer into `Reasoning` and `Content`.

    Args:
      thinking: whether the prompt ends inside `<think>`.
    """

    def __init__(self, thinking: bool):
        self.thinking = thinking  # whether what comes next is thought, as far as is known
        self._held = ""
        self._step = self._start

    def push(self, text: str) -> list[Part]:
        """What this piece of text makes certain."""
        self._held += text
        return self._run(final=False)

    def finish(self) -> list[Part]:
        """What was held back."""
        return self._run(final=True)

    def _run(self, final: bool) -> list[Part]:
        parts: list[Part] = []
        step = None
        while step != self._step:  # until a state stays as it is
            step = self._step
            parts += step(final)
        return parts

    def _take(self, length: int) -> str:
        out, self._held = self._held[:length], self._held[length:]
        return out

    def _start(self, final: bool) -> list[Part]:
        """At the very beginning, where a mark may come that opens."""
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._take(len(self._held) - len(begun) + len(OPEN))
            self.thinking, self._step = True, self._opened
        elif final or not OPEN.startswith(begun):
            self._step = self._opened if self.thinking else self._content
        return []

    def _opened(self, final: bool) -> list[Part]:
        """Line breaks after the mark that opens."""
        self._held = self._held.lstrip("\r\n")
        if self._held:
            self._step = self._reasoning
        return []

    def _reasoning(self, final: bool) -> list[Part]:
        at = self._held.find(CLOSE)
        if at >= 0:
            thought = self._take(at).rstrip()
            self._take(len(CLOSE))
            self.thinking, self._step = False, self._closed
        else:
            sure = len(self._held) - overlap(self._held, CLOSE)
            thought = self._take(len(self._held) if final else len(self._held[:sure].rstrip()))
        return [Reasoning(thought)] if thought else []

    def _closed(self, final: bool) -> list[Part]:
        """Line breaks after the mark that closes."""
        self._held = self._held.lstrip("\r\n")
        if self._held:
            self._step = self._content
        return []

    def _content(self, final: bool) -> list[Part]:
        text = self._take(len(self._held))
        return [Content(text)] if text else []
