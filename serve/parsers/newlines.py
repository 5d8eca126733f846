r"""Literal backslash-n restored to line breaks.

The released model sometimes writes `\n`, two characters, where it means a line break. In code and in maths they may be meant
(`print("a\n")`, `\nabla`), so these pass as they are: fenced blocks and `$$`, `\(`, `\[` to their ends; `code` and `$maths$`
where their end comes soon and on the same line, else their mark is an ordinary character. `\\n` is no line break either.
"""

import re

NEAR = 200  # characters within which a short span must end; what waits for it is held back

_FAR = {"```": "```", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}  # spans of any length, by the mark that opens them
_MARK = re.compile(r"```|\$\$|\\\(|\\\[|\\\\|\\n|`|\$")
_BEGINS = re.compile(r"(?:``?|\$|\\)\Z")  # what may become another mark with the next character


class NewlineParser:
    """Text in, text out."""

    def __init__(self):
        self._held = ""
        self._close: str | None = None  # the mark that ends the long span we are in

    def push(self, text: str) -> str:
        """What this piece of text makes certain."""
        self._held += text
        return self._run(final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._run(final=True)

    def _run(self, final: bool) -> str:
        out = []
        piece: str | None = ""
        while piece is not None:
            out.append(piece)
            piece = self._verbatim(final) if self._close else self._plain(final)
        return "".join(out)

    def _take(self, length: int) -> str:
        out, self._held = self._held[:length], self._held[length:]
        return out

    def _verbatim(self, final: bool) -> str | None:
        at = self._held.find(self._close)
        if at >= 0:
            out = self._take(at + len(self._close))
            self._close = None
            return out
        return self._take(len(self._held) if final else max(len(self._held) - len(self._close) + 1, 0)) or None

    def _plain(self, final: bool) -> str | None:
        mark = _MARK.search(self._held)
        if mark is None:  # a last backslash may become any of four marks
            half = self._held.endswith("\\") and not final
            return self._take(len(self._held) - half) or None
        if mark.start() > 0:
            return self._take(mark.start())
        if not final and _BEGINS.match(self._held):
            return None
        return self._at_mark(mark[0], final)

    def _at_mark(self, mark: str, final: bool) -> str | None:
        if mark == r"\n":
            self._take(2)
            return "\n"
        if mark in _FAR:
            self._close = _FAR[mark]
            return self._take(len(mark))
        if mark == r"\\":
            return self._take(2)
        return self._short(mark, final)

    def _short(self, mark: str, final: bool) -> str | None:
        """A span on one line, if it ends soon; else the mark alone."""
        window = self._held[1 : NEAR + 1]
        line = window.partition("\n")[0]
        known = final or len(window) == NEAR or len(line) < len(window)
        end = _end_of_code(line) if mark == "`" else _end_of_maths(line, known)
        if end is not None:
            return self._take(end + 2)
        return self._take(1) if known else None


def _end_of_code(line: str) -> int | None:
    at = line.find("`")
    return at if at > 0 else None


def _end_of_maths(line: str, known: bool) -> int | None:
    """Dollars are often money: maths touches both of its own, and no digit follows it."""
    if line[:1].isspace():
        return None
    for i, character in enumerate(line):
        follower = line[i + 1 : i + 2]
        if character == "$" and i > 0 and not line[i - 1].isspace() and (follower or known) and not follower.isdigit():
            return i
    return None
