"""Reading a stream of server-sent events.

They end their lines with a line feed; httpx's own lines end at every character that Unicode calls the end of one, and an answer's
JSON may hold such.
"""


class Lines:
    """Puts a stream's pieces together to lines."""

    def __init__(self):
        self._rest = b""

    def take(self, piece: bytes) -> list[str]:
        """The lines that a piece completes, without their ends."""
        *whole, self._rest = (self._rest + piece).split(b"\n")
        return [line.decode().removesuffix("\r") for line in whole]
