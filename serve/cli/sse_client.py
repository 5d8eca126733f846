"""Reads the lines of a stream of server-sent events.

Events end their lines with a line feed. httpx's `iter_lines` also splits at other Unicode line ends, which
the JSON of an answer may contain.
"""


class SSELineReader:
    """Joins the chunks of a stream into lines."""

    def __init__(self):
        self._rest = b""

    def feed(self, chunk: bytes) -> list[str]:
        """Returns the lines that a chunk completes, without their line ends."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line.decode().removesuffix("\r") for line in lines]
