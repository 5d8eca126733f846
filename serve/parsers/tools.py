"""Tool calls found in a stream of text.

A call is given out once it is whole, not letter by letter: only then is it known to be one, and what turns out not to be stays in
the text with nothing lost. Several calls come one by one. White space around calls belongs to them.
"""

from serve.parsers.calls import Tools, may_begin, parameter_is_open, parse
from serve.parsers.parts import Content, Part, ToolCall, overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolParser:
    """Splits text into `Content` and `ToolCall`.

    Args:
      tools: the functions on offer; none, and all is text.
      parallel: whether there may be several calls; else the answer is over after the first.
    """

    def __init__(self, tools: Tools, parallel: bool = True):
        self.ended = False
        self._tools, self._parallel = tools, parallel
        self._held = self._space = ""
        self._inside = self._called = False
        self._looked = 0  # how far an open call has been searched for its end

    def push(self, text: str) -> list[Part]:
        """What this piece of text makes certain."""
        if not self._tools:
            return [Content(text)] if text else []
        self._held += text
        return self._run(final=False)

    def finish(self) -> list[Part]:
        """What was held back. A call that only lacks its closing mark is one."""
        parts = self._run(final=True)
        if self._space and not self._called:
            parts.append(Content(self._space))
        return parts

    def _run(self, final: bool) -> list[Part]:
        parts: list[Part] = []
        progress = True
        while progress and not self.ended:
            progress, found = self._call(final) if self._inside else self._text(final)
            parts += found
        return parts

    def _text(self, final: bool) -> tuple[bool, list[Part]]:
        """Text up to a mark; white space waits until what follows is known."""
        at = self._held.find(OPEN)
        self._inside = at >= 0
        end = at if self._inside else len(self._held) - (0 if final else overlap(self._held, OPEN))
        parts = self._content(self._held[:end])
        self._held = self._held[end + len(OPEN) if self._inside else end :]
        self._looked = 0
        return self._inside, parts

    def _content(self, text: str) -> list[Part]:
        text = self._space + text
        certain = text.rstrip()
        self._space = text[len(certain) :]
        return [Content(certain)] if certain else []

    def _call(self, final: bool) -> tuple[bool, list[Part]]:
        """A call, if it has ended; else whether it can still be one."""
        if not may_begin(self._held):
            return True, self._broken()
        while (at := self._held.find(CLOSE, self._looked)) >= 0:
            if call := parse(self._held[:at], self._tools):
                return True, self._whole(call, at + len(CLOSE))
            self._looked = at + len(CLOSE)
            if not _inside_a_value(self._held[:at]):
                return True, self._broken()
        if final:
            call = parse(self._held, self._tools)
            return True, self._whole(call, len(self._held)) if call else self._broken()
        self._looked = max(self._looked, len(self._held) - len(CLOSE))
        return False, []

    def _whole(self, call: ToolCall, end: int) -> list[Part]:
        self._held, self._space, self._inside, self._called = self._held[end:], "", False, True
        self.ended = not self._parallel
        return [call]

    def _broken(self) -> list[Part]:
        """The mark was text; what follows it is looked at anew, for a call may stand there."""
        self._inside = False
        return self._content(OPEN)


def _inside_a_value(inner: str) -> bool:
    """Whether a closing mark that ends here stands in the middle of an argument, so that a later one may be the call's own."""
    if not inner.lstrip().startswith("{"):
        return parameter_is_open(inner)
    quotes = inner.replace("\\\\", "").replace('\\"', "").count('"')
    return quotes % 2 == 1
