"""One request in the engine: its prompt, what of its pictures is encoded, its answer so far."""

import math
from collections.abc import Iterator

import numpy as np

from minicpmv46_jax.generation.decoding import sampling_mode
from minicpmv46_jax.generation.detokenize import Detokenizer
from minicpmv46_jax.generation.generate import Token
from minicpmv46_jax.library import Delta
from serve.engine.encoder_cache import EncoderCache, Entry
from serve.engine.engine_client import RequestHandle
from serve.engine.request import EngineRequest, MultimodalItem
from serve.engine.scheduler import Request


class RequestState:
    """The engine thread's record of a job.

    Under a constraint `mask` says which token may come next; it is None while it is being made, see `serve.engine.grammar_masks`.

    Args:
      job: whose answer it is.
      work: what is asked.
      longest: tokens that prompt and answer may have.
      detokenizer: tokens to text.
    """

    def __init__(self, job: RequestHandle, work: EngineRequest, longest: int, detokenizer: Detokenizer):
        self.job, self.work, self.mode = job, work, sampling_mode(work.options)
        prompt, new = len(work.ids), work.options.max_new_tokens
        most = longest if new is None else min(prompt + new, longest)
        self.request = Request(prompt, most, work.keys, arrived=job.reserved_at)
        self.request.constrained = work.options.constraint is not None
        self.mask = work.mask
        self.told_at: float | None = None  # when the client was last given a token
        self._stream = detokenizer.stream(work.options.stop)
        self._stops = frozenset(work.options.stop_token_ids)
        self._tokens: list[int] = []
        self._pinned: dict[MultimodalItem, Entry] = {}

    @property
    def newest(self) -> int:
        """The last token it has been given."""
        return self._tokens[-1]

    def ids(self, start: int, end: int) -> np.ndarray:
        """Tokens of prompt and answer, int32."""
        prompt = self.work.ids[start:end]
        if end <= len(self.work.ids):
            return prompt
        behind = len(self.work.ids)
        return np.concatenate([prompt, np.array(self._tokens[max(start - behind, 0) : end - behind], np.int32)])

    def feature_rows(self, start: int, end: int) -> np.ndarray:
        """For each of these tokens the row of the bank that replaces it, or -1; int32."""
        rows = np.full(end - start, -1, np.int32)
        for picture, entry in self._pinned.items():
            first, last = max(picture.start, start), min(picture.end, end)
            if first < last:
                rows[first - start : last - start] = entry.rows[first - picture.start : last - picture.start]
        return rows

    def missing(self) -> Iterator[MultimodalItem]:
        """The pictures that are still to be read and whose features are not there."""
        for picture in self.work.pictures:
            if picture.end > self.request.read and picture not in self._pinned:
                yield picture

    def pin(self, picture: MultimodalItem, entry: Entry) -> None:
        """Its features are, or will be, there."""
        self._pinned[picture] = entry

    def set_readable(self) -> None:
        """The request may be read up to the first picture that is missing, and not to its end as long as a mask is."""
        end = self.request.total - 1 if self.request.constrained and self.mask is None else math.inf
        self.request.readable = next((picture.start for picture in self.missing()), end)

    def unpin(self, features: EncoderCache, *, everything: bool) -> None:
        """Lets go of the pictures that have been read, or of all."""
        for picture in [p for p in self._pinned if everything or p.end <= self.request.read]:
            features.unpin(self._pinned.pop(picture))

    def take(self, tokens: list[Token]) -> Delta:
        """What these tokens, which the device sampled, add to the answer; what lies behind its end is left out."""
        text, kept = [], []
        for token in tokens:
            if token.id in self._stops:
                return self._end(text, kept, "stop")
            kept.append(token)
            self._tokens.append(token.id)
            self.request.known += 1
            text.append(self._stream.push(token.id))
            if self._stream.stopped:
                return self._end(text, kept, "stop")
            if self.request.total == self.request.most:
                return self._end(text, kept, "length")
        return Delta("".join(text), tuple(kept))

    def _end(self, text: list[str], kept: list[Token], reason: str) -> Delta:
        return Delta("".join([*text, self._stream.finish()]), tuple(kept), reason)
