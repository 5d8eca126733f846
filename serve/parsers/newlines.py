r"""Restores literal backslash-n to line breaks.

The released model sometimes writes the two characters `\n` instead of a line break. Code and maths may
contain them (`print("a\n")`, `\nabla`), so code and maths pass unchanged: fenced blocks, `$$`, `\(` and `\[`
up to their ends, and `code` and `$maths$` whose end is near and on the same line. A mark without such an end
is an ordinary character. `\\n` stays too.
"""

import re

MAX_SHORT_SPAN = 200  # characters within which a short span must end; the parser buffers up to as many

_LONG_SPANS = {"```": "```", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}  # opening mark to closing mark of spans of any length
_MARK = re.compile(r"```|\$\$|\\\(|\\\[|\\\\|\\n|`|\$")
_PARTIAL_MARK = re.compile(r"(?:``?|\$|\\)\Z")  # may become another mark with the next character


class NewlineParser:
    """A parser that takes pieces of text and returns the restored text."""

    def __init__(self):
        self._buffer = ""
        self._close = ""  # closing mark of the current long span

    def push(self, text: str) -> str:
        """Returns the text that this piece completes."""
        self._buffer += text
        return self._run(final=False)

    def finish(self) -> str:
        """Returns the text that is still buffered."""
        return self._run(final=True)

    def _run(self, final: bool) -> str:
        out = []
        piece: str | None = ""
        while piece is not None:
            out.append(piece)
            piece = self._take_long_span(final) if self._close else self._take_plain(final)
        return "".join(out)

    def _take(self, length: int) -> str:
        out, self._buffer = self._buffer[:length], self._buffer[length:]
        return out

    def _take_long_span(self, final: bool) -> str | None:
        at = self._buffer.find(self._close)
        if at >= 0:
            out = self._take(at + len(self._close))
            self._close = ""
            return out
        return self._take(len(self._buffer) if final else max(len(self._buffer) - len(self._close) + 1, 0)) or None

    def _take_plain(self, final: bool) -> str | None:
        mark = _MARK.search(self._buffer)
        if mark is None:  # a final backslash may begin any of four marks
            half = self._buffer.endswith("\\") and not final
            return self._take(len(self._buffer) - half) or None
        if mark.start() > 0:
            return self._take(mark.start())
        if not final and _PARTIAL_MARK.match(self._buffer):
            return None
        return self._take_mark(mark[0], final)

    def _take_mark(self, mark: str, final: bool) -> str | None:
        if mark == r"\n":
            self._take(2)
            return "\n"
        if mark in _LONG_SPANS:
            self._close = _LONG_SPANS[mark]
            return self._take(len(mark))
        if mark == r"\\":
            return self._take(2)
        return self._take_short_span(mark, final)

    def _take_short_span(self, mark: str, final: bool) -> str | None:
        """Takes a span on one line if its end is near, else the mark alone."""
        window = self._buffer[1 : MAX_SHORT_SPAN + 1]
        line = window.partition("\n")[0]
        decided = final or len(window) == MAX_SHORT_SPAN or len(line) < len(window)
        end = _end_of_code(line) if mark == "`" else _end_of_maths(line, decided)
        if end is not None:
            return self._take(end + 2)
        return self._take(1) if decided else None


def _end_of_code(line: str) -> int | None:
    at = line.find("`")
    return at if at > 0 else None


def _end_of_maths(line: str, decided: bool) -> int | None:
    """Returns the index of the dollar that ends maths, or None.

    Dollars are often money, so maths touches both of its dollars and no digit follows the second.
    """
    if line[:1].isspace():
        return None
    for i, character in enumerate(line):
        follower = line[i + 1 : i + 2]
        if character == "$" and i > 0 and not line[i - 1].isspace() and (follower or decided) and not follower.isdigit():
            return i
    return None
