"""Token ids to text while they arrive: never half a character, never a stop text's beginning.

The tokenizer is byte-level (GPT-2's table): a token is a run of bytes, a character may span several tokens.
"""

import codecs
import functools
from typing import Any


class Detokenizer:
    """The vocabulary as bytes. One for a model; `stream()` starts one for an answer."""

    def __init__(self, tokenizer: Any):  # a transformers tokenizer; not imported for the annotation, it takes seconds
        decoder = type(tokenizer.backend_tokenizer.decoder).__name__
        if decoder != "ByteLevel":
            raise ValueError(f"the tokenizer's decoder is {decoder}, expected ByteLevel")
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids) | {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.added = {i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}
        self._known = dict(self.added)  # and all that were met since

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; an added token for its own name, an id beyond the vocabulary for nothing."""
        known = self._known.get(token_id)
        if known is None:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            if token is None:
                return b""
            known = self._known[token_id] = bytes(byte_of_character()[c] for c in token)
        return known

    def stream(self, stop: tuple[str, ...] = (), skip_special_tokens: bool = True) -> "TextStream":
        """A stream for one answer that ends before any of the texts in `stop`."""
        return TextStream(self, stop, skip_special_tokens)

    def decode(self, token_ids, skip_special_tokens: bool = True) -> str:
        """All the text of some ids at once."""
        skipped = self.special if skip_special_tokens else ()
        return b"".join(self.token_bytes(i) for i in token_ids if i not in skipped).decode("utf-8", errors="replace")


class TextStream:
    """One answer's text as far as it is certain."""

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...], skip_special_tokens: bool):
        self._detokenizer, self._stop = detokenizer, stop
        self._skip = detokenizer.special if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that this token makes certain, often empty. After a stop text `stopped` is true and nothing follows."""
        if self.stopped or token_id in self._skip:
            return ""
        text = self._utf8.decode(self._detokenizer.token_bytes(token_id))
        return self._release(text, final=False) if self._stop else text

    def finish(self) -> str:
        """What was held back, an unfinished character as U+FFFD."""
        return "" if self.stopped else self._release(self._utf8.decode(b"", final=True), final=True)

    def _release(self, text: str, final: bool) -> str:
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte, the other way round."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}
