"""Generation for one prompt: encode its images, prefill in buckets, decode several tokens per dispatch.

The model functions are the server's, over one slot and pages that grow with the output. The jitted functions
have few
static shapes: buckets of prefill blocks, pages and packed views. `Generator.programs` counts compiled
programs.
Glossary: T tokens, P pages, V vocabulary, R feature rows, D width, N steps per dispatch.
"""

import dataclasses
import functools
import secrets
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from minicpmv46_jax import model
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.generation import sampling
from minicpmv46_jax.generation.decoding import (
    DecodeState,
    FirstTokenInput,
    bias_row,
    decode,
    device_stop_ids,
    has_penalties,
    new_decode_state,
    sample_first,
    sample_held,
    sampling_mode,
    sampling_params,
    set_bias,
)
from minicpmv46_jax.generation.options import Constraint, GenerationOptions
from minicpmv46_jax.generation.sampling import Sampled, SamplingMode
from minicpmv46_jax.model import Params, PrefillInput, TokenBlock, packing
from minicpmv46_jax.model.batch import PrefillBatch
from minicpmv46_jax.model.state import TextState, empty_state, grow_state, pages_of
from minicpmv46_jax.processing import Inputs, View

PREFILL_BUCKETS = (64, 256, 1024)  # tokens of a prefill block; multiples of the kernels' chunk
MIN_CAPACITY = 512  # tokens; doubled as the output grows
STEPS_PER_DISPATCH = 8  # tokens; the first token has a dispatch of its own
STEPS_PER_DISPATCH_CPU = 2  # few, because steps past the output's end are slow there
RECORD_TOKENS = 1024  # tokens per call of record_prompt
SINGLE_ROW = np.zeros(1, np.int32), np.full((1, 2), -1, np.int32)  # slots and new pages of a step: slot 0, no page


@dataclasses.dataclass(frozen=True)
class Token:
    """A decoded token.

    Attributes:
      id: token id.
      logprob: log probability, if requested.
      top: the most likely alternatives as (id, log probability), best first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Generator:
    """Jitted functions over one set of parameters; `backend` as in `model.schema`."""

    def __init__(self, config: ModelConfig, params: Params, backend: str | None = None):
        self.config, self.params = config, params
        graph = model.schema(config, backend)
        self.dtype = params["text"]["embed"]["weight"].dtype
        self.steps = STEPS_PER_DISPATCH_CPU if jax.default_backend() == "cpu" else STEPS_PER_DISPATCH
        self._encode = jax.jit(functools.partial(model.encode, graph.vision))
        self._prefill = jax.jit(functools.partial(model.prefill, graph.text), donate_argnums=1)
        self._forward = jax.jit(functools.partial(model.forward, graph))
        self._decode = jax.jit(
            functools.partial(decode, graph.text, backend=backend),
            static_argnames=("steps", "mode"),
            donate_argnames="decode_state",
        )
        self._empty_state = jax.jit(
            lambda pages: empty_state(config.text, 1, pages, self.dtype, max_pages=pages), static_argnums=0
        )
        # Partials, because jit shares the programs of a bare function; `programs` counts this object's only.
        self._grow_state = jax.jit(functools.partial(grow_state), static_argnums=1)
        self._write_features = jax.jit(functools.partial(write_features), donate_argnums=0)
        self._new_decode_state = jax.jit(functools.partial(new_decode_state), static_argnums=1, donate_argnums=0)
        self._sample_first = jax.jit(functools.partial(sample_first, backend=backend), static_argnames="mode", donate_argnums=0)
        self._sample_held = jax.jit(functools.partial(sample_held, backend=backend), static_argnames="mode", donate_argnums=0)
        self._record_prompt = jax.jit(functools.partial(sampling.record_prompt), donate_argnums=0)
        self._set_bias = jax.jit(functools.partial(set_bias), donate_argnums=0)

    def programs(self) -> dict[str, int]:
        """Returns how many programs of each function have been compiled so far."""
        return {name[1:]: f._cache_size() for name, f in vars(self).items() if hasattr(f, "_cache_size")}

    def features(self, views: Sequence[View]) -> tuple[Float[Array, "R D"], list[int]]:
        """Encodes images.

        Returns:
          The feature rows of all views, padded to a power of two, and each view's first row.
        """
        side = self.config.vision.positions_per_side
        passes = [(group, self._encode(self.params["vision"], packed)) for group, packed in packing.pack(views, side)]
        rows = max(_power_of_two(sum(encoded.shape[0] for _, encoded in passes)), 64)
        features = jnp.zeros((rows, self.config.text.hidden_size), self.dtype)
        first_rows, at = [], 0
        for group, encoded in passes:
            features = self._write_features(features, encoded, at)
            sizes = [views[i].num_tokens for i in group]
            first_rows += (at + np.cumsum([0, *sizes[:-1]])).tolist()
            at += encoded.shape[0]
        return features, first_rows

    def feature_rows(self, inputs: Inputs, first_rows: Sequence[int]) -> Int32[np.ndarray, " T"]:
        """Returns the feature row that replaces each token's embedding; -1 for text tokens.

        Args:
          inputs: the prompt.
          first_rows: each view's first row, as `features` returns it.
        """
        rows = np.full(len(inputs.token_ids), -1, np.int32)
        for view, first in zip(inputs.views, first_rows, strict=True):
            rows[view.start : view.start + view.num_tokens] = np.arange(first, first + view.num_tokens)
        return rows

    def logits(self, inputs: Inputs) -> Float32[np.ndarray, "T V"]:
        """Computes logits at every token of a prompt, without a cache."""
        total = len(inputs.token_ids)
        features, first_rows = self.features(inputs.views)
        block = token_block(inputs.token_ids, self.feature_rows(inputs, first_rows), packing.bucket_size(total))
        return np.asarray(self._forward(self.params, block, features)[0, :total])

    def prefill(self, inputs: Inputs) -> tuple[Float32[Array, "1 V"], TextState]:
        """Prefills a prompt.

        Returns:
          The logits after the prompt's last token, and the state to decode from.

        Raises:
          ValueError: the prompt leaves no room for an output token in the context.
        """
        total, context = len(inputs.token_ids), self.config.text.max_position_embeddings
        if total >= context:
            raise ValueError(f"the prompt has {total} tokens, but the context holds {context}, and the answer needs at least one")
        features, first_rows = self.features(inputs.views)
        rows = self.feature_rows(inputs, first_rows)
        state = self._empty_state(self.pages(total + 1))
        for start, size, padded in prefill_blocks(total):
            part = slice(start, start + size)
            chunk = single_prefill_input(inputs.token_ids[part], rows[part], padded, start, state.block_tables.shape[1])
            logits, state = self._prefill(self.params["text"], state, chunk, features)
        return logits, state

    def tokens(self, inputs: Inputs, options: GenerationOptions) -> Iterator[Token]:
        """Decodes the output token by token; a stop token is included as the last one.

        Ends after a stop token, after `max_new_tokens`, or when the context is full. The next dispatch starts
        once the caller has consumed this one's tokens.
        """
        total, mode, constraint = len(inputs.token_ids), sampling_mode(options), options.constraint
        logits, state = self.prefill(inputs)
        room = self.config.text.max_position_embeddings - total
        left = room if options.max_new_tokens is None else min(options.max_new_tokens, room)
        decode_state = self._start_decode(state, inputs, options)
        allowed = None if constraint is None else constraint.mask()[None]
        decode_state, sampled = self._sample_first(decode_state, logits, single_first_input(options, left), allowed, mode=mode)
        sampled, total = _single_step(sampled), total + 1
        while True:
            for token in row_tokens(sampled, 0, options.logprobs)[:left]:
                yield token
                left -= 1
                if token.id in options.stop_token_ids:
                    return
            if left == 0:
                return
            steps = self.steps if constraint is None else 1
            total += steps
            decode_state = self._reserve_pages(decode_state, total)
            if constraint is None:
                decode_state, sampled = self._decode(self.params["text"], decode_state, *SINGLE_ROW, steps=steps, mode=mode)
                sampled = jax.device_get(sampled)
            else:
                decode_state, sampled = self._decode_constrained(decode_state, constraint, token.id, mode)

    def _start_decode(self, state: TextState, inputs: Inputs, options: GenerationOptions) -> DecodeState:
        """Creates the decode state, with history and biases where the options need them."""
        decode_state = self._new_decode_state(state, self.config.text.vocab_size)
        if has_penalties(options):
            decode_state = dataclasses.replace(decode_state, history=self._record(decode_state.history, inputs.token_ids))
        if options.logit_bias:
            decode_state = dataclasses.replace(
                decode_state, bias=self._set_bias(decode_state.bias, np.int32(0), *bias_row(options))
            )
        return decode_state

    def _decode_constrained(
        self, decode_state: DecodeState, constraint: Constraint, token: int, mode: SamplingMode
    ) -> tuple[DecodeState, Sampled]:
        """Decodes one token; the host makes the mask while the device computes the logits."""
        decode_state, _ = self._decode(self.params["text"], decode_state, *SINGLE_ROW, np.ones(1, bool), steps=1, mode=mode)
        constraint.advance(token)
        decode_state, sampled = self._sample_held(decode_state, np.zeros(1, np.int32), constraint.mask()[None], mode=mode)
        return decode_state, _single_step(sampled)

    def pages(self, tokens: int) -> int:
        """Returns the number of pages for this many tokens: a power of two, or the whole context."""
        return pages_of(min(max(_power_of_two(tokens), MIN_CAPACITY), self.config.text.max_position_embeddings))

    def _reserve_pages(self, decode_state: DecodeState, tokens: int) -> DecodeState:
        """Grows the state to hold this many tokens, at most the whole context."""
        pages = max(self.pages(tokens), decode_state.state.block_tables.shape[1])
        if pages == decode_state.state.block_tables.shape[1]:
            return decode_state
        return dataclasses.replace(decode_state, state=self._grow_state(decode_state.state, pages))

    def _record(self, history: sampling.History, prompt: Int32[np.ndarray, " T"]) -> sampling.History:
        """Records the prompt's tokens in the history of slot 0."""
        for at in range(0, len(prompt), RECORD_TOKENS):
            ids, size = np.zeros(RECORD_TOKENS, np.int32), np.int32(min(RECORD_TOKENS, len(prompt) - at))
            ids[:size] = prompt[at : at + size]
            history = self._record_prompt(history, np.int32(0), ids, size, size, np.bool_(at == 0))
        return history


def write_features(features: Float[Array, "R D"], encoded: Float[Array, "r D"], at: Int32[Array, ""]) -> Float[Array, "R D"]:
    """Writes one pass's features from row `at` on."""
    return jax.lax.dynamic_update_slice(features, encoded, (at, 0))


def prefill_blocks(total: int) -> Iterator[tuple[int, int, int]]:
    """Splits a prompt into blocks: largest ones, then the smallest that holds the rest.

    Yields:
      (start, valid tokens, padded tokens) of each block.
    """
    largest = PREFILL_BUCKETS[-1]
    for start in range(0, total, largest):
        size = min(largest, total - start)
        yield start, size, next(bucket for bucket in PREFILL_BUCKETS if bucket >= size)


def token_block(ids: Int32[np.ndarray, " T"], rows: Int32[np.ndarray, " T"], padded: int) -> TokenBlock:
    """Returns one sequence as a padded batch of one."""
    size = len(ids)
    block = TokenBlock(np.zeros((1, padded), np.int32), np.full((1, padded), -1, np.int32), np.array([size], np.int32))
    block.ids[0, :size], block.feature_rows[0, :size] = ids, rows
    return block


def single_prefill_input(
    ids: Int32[np.ndarray, " T"], rows: Int32[np.ndarray, " T"], padded: int, num_computed: int, pages: int
) -> PrefillInput:
    """Returns a chunk of the prompt for slot 0, which has all pages in order."""
    one = functools.partial(np.array, dtype=np.int32)
    batch = PrefillBatch(
        query_starts=one([0]),
        query_lens=one([len(ids)]),
        num_computed=one([num_computed]),
        slots=one([0]),
        source_slots=one([0 if num_computed else -1]),
        block_tables=np.arange(pages, dtype=np.int32)[None],
        snapshots=np.zeros((0, 2), np.int32),
        snapshot_slots=np.zeros(0, np.int32),
    )
    block = token_block(ids, rows, padded)
    return PrefillInput(block.ids[0], block.feature_rows[0], batch)


def single_first_input(options: GenerationOptions, tokens_left: int) -> FirstTokenInput:
    """Returns the request in slot 0, which may get `tokens_left` tokens; without a seed, a random one is
    drawn.
    """
    seed = secrets.randbits(63) if options.seed is None else options.seed
    one = functools.partial(np.array, dtype=np.int32)
    return FirstTokenInput(
        slots=one([0]),
        sampling=sampling_params([options], [seed]),
        stop_ids=device_stop_ids(options.stop_token_ids)[None],
        num_output_tokens=one([0]),
        tokens_left=one([tokens_left]),
    )


def _single_step(sampled: Sampled) -> Sampled:
    """Fetches the tokens of one step, [B, ...], as [B, 1, ...] on the host."""
    return jax.tree.map(lambda x: x[:, None], jax.device_get(sampled))


def row_tokens(sampled: Sampled, row: int, logprobs: int | None) -> list[Token]:
    """Returns the tokens of one row.

    Args:
      sampled: on the host, [B, N, ...].
      row: index of the row.
      logprobs: number of alternatives per token; None for no log probabilities.
    """
    ids = sampled.ids[row].tolist()
    if logprobs is None:
        return [Token(i) for i in ids]
    # Requests for log probabilities are sampled in mode "full", which returns all three.
    assert sampled.logprob is not None and sampled.top_ids is not None and sampled.top_logprobs is not None
    tops = zip(sampled.top_ids[row, :, :logprobs].tolist(), sampled.top_logprobs[row, :, :logprobs].tolist(), strict=True)
    own = sampled.logprob[row].tolist()
    return [Token(i, p, tuple(zip(*top, strict=True))) for i, p, top in zip(ids, own, tops, strict=True)]


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
