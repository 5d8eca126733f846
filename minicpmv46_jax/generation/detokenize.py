"""Streaming detokenization: no partial characters, and no text that may begin a stop text.

The tokenizer is byte-level (GPT-2's table): a token is a run of bytes. A character may span several tokens.
"""

import codecs
import functools
from typing import Any


class Detokenizer:
    """Vocabulary as bytes, one object per model; `stream()` makes the detokenizer of one output."""

    def __init__(self, tokenizer: Any):  # a transformers tokenizer; importing the class takes seconds
        decoder = type(tokenizer.backend_tokenizer.decoder).__name__
        if decoder != "ByteLevel":
            raise ValueError(f"the tokenizer's decoder is {decoder}, expected ByteLevel")
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids) | {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.added = {i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}
        self._bytes = dict(self.added)  # a cache; grows with the tokens seen

    def token_bytes(self, token_id: int) -> bytes:
        """Returns a token's bytes: an added token's name, and b"" for an id beyond the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            if token is None:
                return b""
            found = self._bytes[token_id] = bytes(character_bytes()[c] for c in token)
        return found

    def stream(self, stop: tuple[str, ...] = (), skip_special_tokens: bool = True) -> "TextStream":
        """Returns a stream for one output that ends before any of the texts in `stop`."""
        return TextStream(self, stop, skip_special_tokens)

    def decode(self, token_ids, skip_special_tokens: bool = True) -> str:
        """Decodes token ids to text at once; invalid UTF-8 becomes U+FFFD."""
        skipped = self.special if skip_special_tokens else ()
        return b"".join(self.token_bytes(i) for i in token_ids if i not in skipped).decode("utf-8", errors="replace")


class TextStream:
    """Text of one output, released once it is final.

    Attributes:
      stopped: True after a stop text.
    """

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...], skip_special_tokens: bool):
        self._detokenizer, self._stop = detokenizer, stop
        self._skip = detokenizer.special if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Returns the text that is final after this token, often "".

        After a stop text `stopped` is True, and all further text is "".
        """
        if self.stopped or token_id in self._skip:
            return ""
        text = self._utf8.decode(self._detokenizer.token_bytes(token_id))
        return self._release(text, final=False) if self._stop else text

    def finish(self) -> str:
        """Returns the text held back so far; an incomplete character becomes U+FFFD."""
        return "" if self.stopped else self._release(self._utf8.decode(b"", final=True), final=True)

    def _release(self, text: str, final: bool) -> str:
        self._pending += text
        found = [at for at in (self._pending.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            out, self._pending = self._pending[: min(found)], ""
            return out
        keep = 0 if final else max((_overlap_length(self._pending, stop) for stop in self._stop), default=0)
        cut = len(self._pending) - keep
        out, self._pending = self._pending[:cut], self._pending[cut:]
        return out


def _overlap_length(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@functools.cache
def character_bytes() -> dict[str, int]:
    """Returns the byte of each character of GPT-2's byte-to-character table."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}
