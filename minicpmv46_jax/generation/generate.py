"""Answering one prompt: encode its pictures, prefill in buckets, decode several tokens a dispatch.

The same model functions as the server's, over one slot and pages that grow with the answer. Every jitted function here has static
shapes drawn from few buckets: prefill blocks, pages, packed pictures. `Generator.programs` counts what was compiled.
Glossary: T tokens in a block, P pages, V vocabulary, R feature rows, N steps a dispatch.
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
from minicpmv46_jax.model.state import KeyValues, TextState, empty_state, pages_of
from minicpmv46_jax.processing import Inputs, View

PREFILL_BUCKETS = (64, 256, 1024)  # tokens a block; multiples of the gated delta chunk
SMALLEST_CAPACITY = 512  # tokens; doubled as an answer grows
STEPS_PER_DISPATCH = 8  # tokens; a stream's first comes alone
STEPS_PER_DISPATCH_CPU = 2  # where a step takes as long as it does there, those past an answer's end are dear
NOTE_TOKENS = 1024  # tokens entered into a history at once
ONE_ROW = np.zeros(1, np.int32), np.full((1, 2), -1, np.int32)  # of a step: slot 0; its table is full already


@dataclasses.dataclass(frozen=True)
class Token:
    """A decoded token. Where asked for with its log probability, and `top` alternatives: (id, log probability), best first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Generator:
    """The jitted functions over one set of parameters; `backend` as in `model.schema`."""

    def __init__(self, config: ModelConfig, params: Params, backend: str | None = None):
        self.config, self.params = config, params
        graph = model.schema(config, backend)
        self.dtype = params["text"]["embed"]["weight"].dtype
        self.steps = STEPS_PER_DISPATCH_CPU if jax.default_backend() == "cpu" else STEPS_PER_DISPATCH
        self._encode = jax.jit(functools.partial(model.encode, graph.vision))
        self._read = jax.jit(functools.partial(model.prefill, graph.text), donate_argnums=1)
        self._forward = jax.jit(functools.partial(model.forward, graph))
        self._decode = jax.jit(
            functools.partial(decode, graph.text), static_argnames=("steps", "mode"), donate_argnames="decode_state"
        )
        self._empty = jax.jit(lambda pages: empty_state(config.text, 1, pages, self.dtype, max_pages=pages), static_argnums=0)
        # Partials of bare functions too: jax shares a bare function's compilations among all who jit it; `programs` counts ours.
        self._grow = jax.jit(functools.partial(grow), static_argnums=1)
        self._place = jax.jit(functools.partial(place), donate_argnums=0)
        self._new = jax.jit(functools.partial(new_decode_state), static_argnums=1, donate_argnums=0)
        self._start = jax.jit(functools.partial(sample_first), static_argnames="mode", donate_argnums=0)
        self._sample_held = jax.jit(functools.partial(sample_held), static_argnames="mode", donate_argnums=0)
        self._record_prompt = jax.jit(functools.partial(sampling.record_prompt), donate_argnums=0)
        self._set_bias = jax.jit(functools.partial(set_bias), donate_argnums=0)

    def programs(self) -> dict[str, int]:
        """How many variants of each function have been compiled so far."""
        return {name[1:]: f._cache_size() for name, f in vars(self).items() if hasattr(f, "_cache_size")}

    def features(self, views: Sequence[View]) -> tuple[Float[Array, "R D"], list[int]]:
        """Encodes pictures.

        Returns:
          The feature rows of all views, padded to a power of two, and each view's first row.
        """
        side = self.config.vision.positions_per_side
        passes = [(group, self._encode(self.params["vision"], packed)) for group, packed in packing.pack(views, side)]
        rows = max(_power_of_two(sum(features.shape[0] for _, features in passes)), 64)
        bank = jnp.zeros((rows, self.config.text.hidden_size), self.dtype)
        firsts, at = [], 0
        for group, features in passes:
            bank = self._place(bank, features, at)
            sizes = [views[i].num_tokens for i in group]
            firsts += (at + np.cumsum([0, *sizes[:-1]])).tolist()
            at += features.shape[0]
        return bank, firsts

    def feature_rows(self, inputs: Inputs, firsts: Sequence[int]) -> Int32[np.ndarray, " T"]:
        """For every token the feature row that replaces it, -1 for words."""
        rows = np.full(len(inputs.token_ids), -1, np.int32)
        for view, first in zip(inputs.views, firsts, strict=True):
            rows[view.start : view.start + view.num_tokens] = np.arange(first, first + view.num_tokens)
        return rows

    def logits(self, inputs: Inputs) -> Float32[np.ndarray, "T V"]:
        """Scores at every token of a prompt, without a cache."""
        total = len(inputs.token_ids)
        features, firsts = self.features(inputs.views)
        block = token_block(inputs.token_ids, self.feature_rows(inputs, firsts), packing.bucket(total))
        return np.asarray(self._forward(self.params, block, features)[0, :total])

    def prefill(self, inputs: Inputs) -> tuple[Float32[Array, "1 V"], TextState]:
        """Reads a prompt; returns the logits after its last token and the state to decode from.

        Raises:
          ValueError: if the prompt leaves no room for an answer in the context.
        """
        total, context = len(inputs.token_ids), self.config.text.max_position_embeddings
        if total >= context:
            raise ValueError(f"the prompt has {total} tokens, but the context holds {context}, at least one of them the answer's")
        features, firsts = self.features(inputs.views)
        rows = self.feature_rows(inputs, firsts)
        state = self._empty(self.pages(total + 1))
        for begin, size, block in blocks(total):
            part = slice(begin, begin + size)
            piece = one_piece(inputs.token_ids[part], rows[part], block, begin, state.block_tables.shape[1])
            logits, state = self._read(self.params["text"], state, piece, features)
        return logits, state

    def tokens(self, inputs: Inputs, options: GenerationOptions) -> Iterator[Token]:
        """Decodes an answer token by token, a stop token included as the last one.

        Ends after a stop token, after `max_new_tokens`, or when the context is full. The next dispatch waits until the caller has
        taken this one's tokens: sent ahead it gained nothing on an H200, where sending takes as long as running.
        """
        total, mode, constraint = len(inputs.token_ids), sampling_mode(options), options.constraint
        logits, state = self.prefill(inputs)
        room = self.config.text.max_position_embeddings - total
        left = room if options.max_new_tokens is None else min(options.max_new_tokens, room)
        decode_state = self._begin(state, inputs, options)
        allowed = None if constraint is None else constraint.mask()[None]
        decode_state, sampled = self._start(decode_state, logits, one_start(options, left), allowed, mode=mode)
        sampled, total = _step_of(sampled), total + 1
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
            decode_state = self._fit(decode_state, total)
            if constraint is None:
                decode_state, sampled = self._decode(self.params["text"], decode_state, *ONE_ROW, steps=steps, mode=mode)
                sampled = jax.device_get(sampled)
            else:
                decode_state, sampled = self._decode_constrained(decode_state, constraint, token.id, mode)

    def _begin(self, state: TextState, inputs: Inputs, options: GenerationOptions) -> DecodeState:
        """What is to be known before the first token is sampled."""
        decode_state = self._new(state, self.config.text.vocab_size)
        if has_penalties(options):
            decode_state = dataclasses.replace(decode_state, history=self._with_prompt(decode_state.history, inputs.token_ids))
        if options.logit_bias:
            decode_state = dataclasses.replace(
                decode_state, bias=self._set_bias(decode_state.bias, np.int32(0), *bias_row(options))
            )
        return decode_state

    def _decode_constrained(
        self, decode_state: DecodeState, constraint: Constraint, token: int, mode: SamplingMode
    ) -> tuple[DecodeState, Sampled]:
        """One token more; the mask is made while the device computes the scores."""
        decode_state, _ = self._decode(self.params["text"], decode_state, *ONE_ROW, np.ones(1, bool), steps=1, mode=mode)
        constraint.advance(token)
        decode_state, sampled = self._sample_held(decode_state, np.zeros(1, np.int32), constraint.mask()[None], mode=mode)
        return decode_state, _step_of(sampled)

    def pages(self, tokens: int) -> int:
        """Pages that hold this many tokens: a power of two, or the whole context."""
        return pages_of(min(max(_power_of_two(tokens), SMALLEST_CAPACITY), self.config.text.max_position_embeddings))

    def _fit(self, decode_state: DecodeState, tokens: int) -> DecodeState:
        """With room for this many tokens, or for the whole context."""
        pages = max(self.pages(tokens), decode_state.state.block_tables.shape[1])
        if pages == decode_state.state.block_tables.shape[1]:
            return decode_state
        return dataclasses.replace(decode_state, state=self._grow(decode_state.state, pages))

    def _with_prompt(self, history: sampling.History, prompt: Int32[np.ndarray, " T"]) -> sampling.History:
        for at in range(0, len(prompt), NOTE_TOKENS):
            ids, size = np.zeros(NOTE_TOKENS, np.int32), np.int32(min(NOTE_TOKENS, len(prompt) - at))
            ids[:size] = prompt[at : at + size]
            history = self._record_prompt(history, np.int32(0), ids, size, size, np.bool_(at == 0))
        return history


def grow(state: TextState, pages: int) -> TextState:
    """One sequence with room for so many pages, which are all its own."""

    def grown(x: Float[Array, "P page KH"]) -> Float[Array, "P2 page KH"]:
        return jnp.pad(x, [(0, pages - x.shape[0]), (0, 0), (0, 0)])

    layers = (KeyValues(grown(x.keys), grown(x.values)) if isinstance(x, KeyValues) else x for x in state.layers)
    return TextState(tuple(layers), jnp.arange(pages, dtype=jnp.int32)[None], state.seq_lens)


def place(bank: Float[Array, "R D"], features: Float[Array, "r D"], at: Int32[Array, ""]) -> Float[Array, "R D"]:
    """The bank with `features` written from row `at` on."""
    return jax.lax.dynamic_update_slice(bank, features, (at, 0))


def blocks(total: int) -> Iterator[tuple[int, int, int]]:
    """Cuts a prompt into (start, real tokens, padded tokens): whole largest blocks, then the smallest that holds the rest."""
    largest = PREFILL_BUCKETS[-1]
    for begin in range(0, total, largest):
        size = min(largest, total - begin)
        yield begin, size, next(bucket for bucket in PREFILL_BUCKETS if bucket >= size)


def token_block(ids: Int32[np.ndarray, " T"], rows: Int32[np.ndarray, " T"], padded: int) -> TokenBlock:
    """One sequence's tokens as a padded batch of one."""
    size = len(ids)
    block = TokenBlock(np.zeros((1, padded), np.int32), np.full((1, padded), -1, np.int32), np.array([size], np.int32))
    block.ids[0, :size], block.feature_rows[0, :size] = ids, rows
    return block


def one_piece(ids: Int32[np.ndarray, " T"], rows: Int32[np.ndarray, " T"], padded: int, before: int, pages: int) -> PrefillInput:
    """A piece of the prompt in slot 0, which has all pages in order; `before` are the tokens that came earlier."""
    one = functools.partial(np.array, dtype=np.int32)
    chunks = PrefillBatch(
        query_starts=one([0]),
        query_lens=one([len(ids)]),
        num_computed=one([before]),
        slots=one([0]),
        source_slots=one([0 if before else -1]),
        block_tables=np.arange(pages, dtype=np.int32)[None],
        snapshots=np.zeros((0, 2), np.int32),
        snapshot_slots=np.zeros(0, np.int32),
    )
    block = token_block(ids, rows, padded)
    return PrefillInput(block.ids[0], block.feature_rows[0], chunks)


def one_start(options: GenerationOptions, left: int) -> FirstTokenInput:
    """The answer in slot 0 that may get `left` tokens; without a seed, one is drawn."""
    seed = secrets.randbits(63) if options.seed is None else options.seed
    one = functools.partial(np.array, dtype=np.int32)
    return FirstTokenInput(
        slots=one([0]),
        sampling=sampling_params([options], [seed]),
        stops=device_stop_ids(options.stop_token_ids)[None],
        num_output_tokens=one([0]),
        tokens_left=one([left]),
    )


def _step_of(sampled: Sampled) -> Sampled:
    """What was sampled once, [B, ...], as [B, N, ...] on the host."""
    return jax.tree.map(lambda x: x[:, None], jax.device_get(sampled))


def row_tokens(sampled: Sampled, row: int, logprobs: int | None) -> list[Token]:
    """A row's tokens out of what was sampled, [B, N, ...] on the host; with so many alternatives, or None for none at all."""
    ids = sampled.ids[row].tolist()
    if logprobs is None:
        return [Token(i) for i in ids]
    tops = zip(sampled.top_ids[row, :, :logprobs].tolist(), sampled.top_logprobs[row, :, :logprobs].tolist(), strict=True)
    own = sampled.logprob[row].tolist()
    return [Token(i, p, tuple(zip(*top, strict=True))) for i, p, top in zip(ids, own, tops, strict=True)]


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
