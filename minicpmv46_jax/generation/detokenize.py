"""Streaming detokenization: no partial characters, and no text that may begin a stop text.

The tokenizer is byte-level (GPT-2's table): a token is a run of bytes. A character may span several tokens.
"""

import codecs
import functools
from collections.abc import Iterable
from typing import Any

from minicpmv46_jax.generation.stop_texts import StopTexts


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

    def stream(self, stop: Iterable[str] = (), skip_special_tokens: bool = True) -> "TextStream":
        """Returns a stream for one output that ends before any of the texts in `stop`."""
        return TextStream(self, stop if isinstance(stop, StopTexts) else StopTexts(stop), skip_special_tokens)

    def decode(self, token_ids, skip_special_tokens: bool = True) -> str:
        """Decodes token ids to text at once; invalid UTF-8 becomes U+FFFD."""
        skipped = self.special if skip_special_tokens else ()
        return b"".join(self.token_bytes(i) for i in token_ids if i not in skipped).decode("utf-8", errors="replace")


class TextStream:
    """Text of one output, released once it is final.

    Attributes:
      stopped: True after a stop text.
    """

    def __init__(self, detokenizer: Detokenizer, stop: StopTexts, skip_special_tokens: bool):
        self._detokenizer, self._stop = detokenizer, stop
        self._skip = detokenizer.special if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held, self._state = "", 0  # the text that may begin a stop text, and the automaton's state after it
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Returns the text that is final after this token, often "".

        After a stop text `stopped` is True, and all further text is "".
        """
        if self.stopped or token_id in self._skip:
            return ""
        text = self._utf8.decode(self._detokenizer.token_bytes(token_id))
        return self._release(text) if self._stop else text

    def finish(self) -> str:
        """Returns the text held back so far; an incomplete character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        return text if self.stopped else text + self._held

    def _release(self, text: str) -> str:
        """Appends text, and returns the text before a stop text, or else all that can begin none.

        If the appended text completes several stop texts, the one that begins first counts.
        """
        stop, state, start, first = self._stop, self._state, len(self._held), None
        for end, character in enumerate(text, start + 1):
            state = stop.step(state, character)
            if length := stop.match[state]:
                first = end - length if first is None else min(first, end - length)
        pending = self._held + text
        if first is not None:
            self.stopped = True
            return pending[:first]
        cut = len(pending) - stop.depth[state]
        self._held, self._state = pending[cut:], state
        return pending[:cut]


@functools.cache
def character_bytes() -> dict[str, int]:
    """Returns the byte of each character of GPT-2's byte-to-character table."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}
