"""A running request in the engine: its prompt, its encoder cache entries, and its output so far."""

import math
from collections.abc import Iterator

import numpy as np

from minicpmv46_jax.generation.decoding import sampling_mode
from minicpmv46_jax.generation.detokenize import Detokenizer
from minicpmv46_jax.generation.generate import Token
from minicpmv46_jax.generation.sampling import SamplingMode
from minicpmv46_jax.library import Delta
from serve.engine.encoder_cache import EncoderCache, EncoderCacheEntry
from serve.engine.engine_client import RequestHandle
from serve.engine.request import EngineRequest, MultimodalItem
from serve.engine.scheduler import Request


class RequestState(Request):
    """The engine thread's record of a request; the scheduler works on the part that it inherits.

    `mask` is the grammar mask of the next token. It is None without a grammar and while a
    thread computes it.

    Args:
      handle: where the output goes.
      request: the prompt and the options.
      max_model_len: tokens that prompt and output may have.
      detokenizer: turns tokens into text.
    """

    def __init__(self, handle: RequestHandle, request: EngineRequest, max_model_len: int, detokenizer: Detokenizer):
        num_prompt_tokens, new = len(request.token_ids), request.options.max_new_tokens
        super().__init__(
            num_prompt_tokens,
            max_model_len if new is None else min(num_prompt_tokens + new, max_model_len),
            request.block_hashes,
            arrival_time=handle.reserved_at,
            uses_grammar=request.options.constraint is not None,
        )
        self.handle, self.request = handle, request
        self.mode: SamplingMode = sampling_mode(request.options)
        self.mask = request.mask
        self.last_token_time: float | None = None
        self._text_stream = detokenizer.stream(request.options.stop)
        self._stop_token_ids = frozenset(request.options.stop_token_ids)
        self._output_ids: list[int] = []
        self._pinned: dict[MultimodalItem, EncoderCacheEntry] = {}

    @property
    def last_token_id(self) -> int:
        """The newest output token."""
        return self._output_ids[-1]

    def token_ids(self, start: int, end: int) -> np.ndarray:
        """Returns tokens `start` to `end` of prompt and output, int32."""
        prompt = self.request.token_ids[start:end]
        if end <= self.num_prompt_tokens:
            return prompt
        output = self._output_ids[max(start - self.num_prompt_tokens, 0) : end - self.num_prompt_tokens]
        return np.concatenate([prompt, np.array(output, np.int32)])

    def encoder_rows(self, start: int, end: int) -> np.ndarray:
        """Returns, for tokens `start` to `end`, the row of the encoder cache that replaces each, or -1;
        int32.
        """
        rows = np.full(end - start, -1, np.int32)
        for item, entry in self._pinned.items():
            first, last = max(item.start, start), min(item.end, end)
            if first < last:
                rows[first - start : last - start] = entry.rows[first - item.start : last - item.start]
        return rows

    def unencoded_items(self) -> Iterator[MultimodalItem]:
        """Yields the items that are not prefilled yet and have no encoder cache entry."""
        for item in self.request.mm_items:
            if item.end > self.num_computed_tokens and item not in self._pinned:
                yield item

    def attach(self, item: MultimodalItem, entry: EncoderCacheEntry) -> None:
        """Records the entry of an item, which `EncoderCache` has pinned."""
        self._pinned[item] = entry

    def unpin(self, cache: EncoderCache, *, all_items: bool) -> None:
        """Unpins the items that are prefilled, or all of them."""
        for item in [p for p in self._pinned if all_items or p.end <= self.num_computed_tokens]:
            cache.unpin(self._pinned.pop(item))

    def forget_items(self) -> None:
        """Forgets the entries of all items: the encoder cache has been cleared."""
        self._pinned.clear()

    def update_ready_tokens(self) -> None:
        """Limits prefill to the first unencoded item.

        Excludes the last token while its grammar mask is missing.
        """
        end = self.num_tokens - 1 if self.uses_grammar and self.mask is None else math.inf
        self.num_ready_tokens = next((item.start for item in self.unencoded_items()), end)

    def add_tokens(self, tokens: list[Token]) -> Delta:
        """Appends sampled tokens to the output and returns the change; tokens after the end are dropped."""
        text, kept = [], []
        for token in tokens:
            if token.id in self._stop_token_ids:
                return self._last_delta(text, kept, "stop")
            kept.append(token)
            self._output_ids.append(token.id)
            self.num_output_tokens += 1
            text.append(self._text_stream.push(token.id))
            if self._text_stream.stopped:
                return self._last_delta(text, kept, "stop")
            if self.num_tokens == self.max_total_tokens:
                return self._last_delta(text, kept, "length")
        return Delta("".join(text), tuple(kept))

    def _last_delta(self, text: list[str], kept: list[Token], reason: str) -> Delta:
        return Delta("".join([*text, self._text_stream.finish()]), tuple(kept), reason)
