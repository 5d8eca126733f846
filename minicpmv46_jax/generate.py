"""Answering one prompt: encode its pictures, prefill in buckets, decode several tokens a dispatch.

Every jitted function here has static shapes drawn from few buckets: prefill blocks, cache capacities, packed pictures.
`Generator.programs` counts what was compiled.
Glossary: B sequences (1 here), T tokens in a block, S cache slots, V vocabulary, R feature rows, N steps a dispatch.
"""

import dataclasses
import functools
import secrets
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from minicpmv46_jax import model, packing
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.model import Params, TokenBlock
from minicpmv46_jax.options import GenerationOptions
from minicpmv46_jax.processing import Inputs, View
from minicpmv46_jax.sampling import MAX_LOGPROBS, History, Sampled, SamplingParams, Steering, new_history, sample
from minicpmv46_jax.state import DeltaState, KeyValues, TextState, empty_state
from minicpmv46_jax.trees import tree_dataclass

PREFILL_BUCKETS = (64, 256, 1024)  # tokens a block; multiples of the gated delta chunk
SMALLEST_CAPACITY = 512  # cache slots; doubled as an answer grows
STEPS_PER_DISPATCH = 8  # tokens; a stream's first comes alone
STEPS_PER_DISPATCH_CPU = 2  # where a step takes as long as it does there, those past an answer's end are dear
DEVICE_STOPS = 16  # stop tokens the device looks out for; the host looks out for all


@dataclasses.dataclass(frozen=True)
class Token:
    """One decoded token. `top` holds the alternatives asked for: (id, log probability), best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@tree_dataclass
class Decoding:
    """What a decode step carries on: the sequences, their histories, and each row's newest token."""

    state: TextState
    history: History
    last: Int32[Array, " B"]
    done: Bool[Array, " B"]


class Generator:
    """The jitted functions over one set of parameters; `backend` as in `model.schema`."""

    def __init__(self, config: ModelConfig, params: Params, backend: str | None = None):
        self.config, self.params = config, params
        graph = model.schema(config, backend)
        self.dtype = params["text"]["embed"]["weight"].dtype
        self.steps = STEPS_PER_DISPATCH_CPU if jax.default_backend() == "cpu" else STEPS_PER_DISPATCH
        self._encode = jax.jit(functools.partial(model.encode, graph.vision))
        self._embed = jax.jit(functools.partial(model.embed))
        self._advance = jax.jit(functools.partial(model.advance, graph.text), donate_argnums=1)
        self._forward = jax.jit(lambda params, *args: model.forward(graph, params, config, *args))
        self._decode = jax.jit(
            functools.partial(decode, graph.text), static_argnames=("steps", "num_logprobs"), donate_argnames="decoding"
        )
        self._empty = jax.jit(lambda capacity: empty_state(config.text, 1, capacity, self.dtype), static_argnums=0)
        # Partials of bare functions too: jax shares a bare function's compilations among all who jit it; `programs` counts ours.
        self._grow = jax.jit(functools.partial(grow), static_argnums=1)
        self._place = jax.jit(functools.partial(place), donate_argnums=0)
        self._begin = jax.jit(functools.partial(begin), static_argnames="num_logprobs", donate_argnames="state")

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

    def prefill(self, inputs: Inputs) -> tuple[Float32[Array, "B V"], TextState]:
        """Reads a prompt; returns the logits after its last token and the state to decode from.

        Raises:
          ValueError: if the prompt leaves no room for an answer in the context.
        """
        total, context = len(inputs.token_ids), self.config.text.max_position_embeddings
        if total >= context:
            raise ValueError(f"the prompt has {total} tokens, but the context holds {context}, at least one of them the answer's")
        features, firsts = self.features(inputs.views)
        rows = self.feature_rows(inputs, firsts)
        state, text = self._empty(self.capacity(total + 1)), self.params["text"]
        for start, size, block in blocks(total):
            tokens = token_block(inputs.token_ids[start : start + size], rows[start : start + size], block)
            x = self._embed(text["embed"], tokens, features)
            logits, state = self._advance(text, state, x, tokens.num_valid)
        return logits, state

    def tokens(self, inputs: Inputs, options: GenerationOptions) -> Iterator[Token]:
        """Decodes an answer token by token, a stop token included as the last one.

        Ends after a stop token, after `max_new_tokens`, or when the context is full. The next dispatch waits until the caller has
        taken this one's tokens: sent ahead it gained nothing on an H200, where sending takes as long as running.
        """
        total = len(inputs.token_ids)
        logits, state = self.prefill(inputs)
        room = self.config.text.max_position_embeddings - total
        left = room if options.max_new_tokens is None else min(options.max_new_tokens, room)
        params, stops = sampling_params(options), set(options.stop_token_ids)
        num_logprobs = MAX_LOGPROBS if options.logprobs else 0

        watched = device_stops(stops)
        prompt = np.zeros((1, self.capacity(total)), np.int32)
        prompt[0, :total] = inputs.token_ids
        steps, steering = (1 if options.constraint else self.steps), steering_of(options, logits.shape[1])
        decoding, sampled = self._begin(state, logits, params, prompt, watched, steering, num_logprobs=num_logprobs)
        total += 1
        while True:
            for token in _tokens(sampled, options.logprobs)[:left]:
                yield token
                left -= 1
                if token.id in stops:
                    return
                if options.constraint is not None:
                    options.constraint.advance(token.id)
                    steering = steering_of(options, logits.shape[1])
            if left == 0:
                return
            total += steps
            decoding, sampled = self._decode(
                self.params["text"],
                self._fit(decoding, total),
                params,
                watched,
                steering,
                steps=steps,
                num_logprobs=num_logprobs,
            )

    def capacity(self, tokens: int) -> int:
        """The cache size that holds this many tokens: a power of two, or the whole context."""
        return min(max(_power_of_two(tokens), SMALLEST_CAPACITY), self.config.text.max_position_embeddings)

    def _fit(self, decoding: Decoding, tokens: int) -> Decoding:
        slots = next((layer.keys.shape[1] for layer in decoding.state.layers if isinstance(layer, KeyValues)), tokens)
        if tokens <= slots or slots == self.config.text.max_position_embeddings:
            return decoding
        return dataclasses.replace(decoding, state=self._grow(decoding.state, self.capacity(tokens)))


def begin(
    state: TextState,
    logits: Float32[Array, "B V"],
    sampling: SamplingParams,
    prompt: Int32[Array, "B T"],
    stops: Int32[Array, " E"],
    steering: Steering | None = None,
    *,
    num_logprobs: int,
) -> tuple[Decoding, Sampled]:
    """Samples every row's first token.

    Args:
      state, logits: what prefill left; the state is donated.
      sampling: how each row is sampled.
      prompt: the rows' tokens, padded.
      stops, steering: as `decode` takes them.
      num_logprobs: static number K of alternatives.

    Returns:
      Where the rows stand, and what was sampled ([B, 1] and [B, 1, K]).
    """
    history = new_history(prompt, state.length, logits.shape[1])
    first, history = sample(logits, sampling, history, num_logprobs, steering)
    sampled = jax.tree.map(lambda x: x[:, None], first)
    return Decoding(state, history, first.ids, is_stop(first.ids, stops)), sampled


def decode(
    graph,
    params: Params,
    decoding: Decoding,
    sampling: SamplingParams,
    stops: Int32[Array, " E"],
    steering: Steering | None = None,
    *,
    steps: int,
    num_logprobs: int,
) -> tuple[Decoding, Sampled]:
    """The next `steps` tokens of every row, in one loop on the device.

    The number of steps is static: on an H200 a loop that looks each time whether to go on took 1.53 ms a step, this one 1.46.

    Args:
      graph, params: the text backbone.
      decoding: where the rows stand; donated.
      sampling: how each row is sampled.
      stops: tokens after which a row is done; -1 for none. A done row repeats its last token and its state rests.
      steering: what requests add to the scores. What it allows is the next token's: then `steps` is 1.
      steps: static number N of tokens.
      num_logprobs: static number K of alternatives.

    Returns:
      Where the rows stand now, and what was sampled ([B, N] and [B, N, K]).
    """
    text = model.merge(graph, params)

    def step(at: Decoding, _: None) -> tuple[Decoding, Sampled]:
        hidden, state = text(text.embed(at.last)[:, None], at.state, (~at.done).astype(jnp.int32))
        sampled, history = sample(text.logits(hidden[:, 0]), sampling, at.history, num_logprobs, steering)
        sampled = sampled._replace(ids=jnp.where(at.done, at.last, sampled.ids))
        return Decoding(state, history, sampled.ids, at.done | is_stop(sampled.ids, stops)), sampled

    decoding, sampled = jax.lax.scan(step, decoding, None, length=steps)
    return decoding, jax.tree.map(lambda x: x.swapaxes(0, 1), sampled)


def is_stop(ids: Int32[Array, " B"], stops: Int32[Array, " E"]) -> Bool[Array, " B"]:
    """Which rows have sampled a token that ends them."""
    return (ids[:, None] == stops[None]).any(axis=1)


def device_stops(stops: set[int]) -> Int32[np.ndarray, " E"]:
    """As many stop tokens as the device looks out for, -1 where there are fewer."""
    out = np.full(DEVICE_STOPS, -1, np.int32)
    out[: min(len(stops), DEVICE_STOPS)] = sorted(stops)[:DEVICE_STOPS]
    return out


def grow(state: TextState, capacity: int) -> TextState:
    """The same sequences with room for `capacity` tokens."""

    def grown(layer: KeyValues | DeltaState) -> KeyValues | DeltaState:
        if isinstance(layer, DeltaState):
            return layer
        pad = [(0, 0), (0, capacity - layer.keys.shape[1]), (0, 0), (0, 0)]
        return KeyValues(jnp.pad(layer.keys, pad), jnp.pad(layer.values, pad))

    return TextState(tuple(grown(layer) for layer in state.layers), state.length)


def place(bank: Float[Array, "R D"], features: Float[Array, "r D"], at: Int32[Array, ""]) -> Float[Array, "R D"]:
    """The bank with `features` written from row `at` on."""
    return jax.lax.dynamic_update_slice(bank, features, (at, 0))


def blocks(total: int) -> Iterator[tuple[int, int, int]]:
    """Cuts a prompt into (start, real tokens, padded tokens): whole largest blocks, then the smallest that holds the rest."""
    largest = PREFILL_BUCKETS[-1]
    for start in range(0, total, largest):
        size = min(largest, total - start)
        yield start, size, next(bucket for bucket in PREFILL_BUCKETS if bucket >= size)


def token_block(ids: Int32[np.ndarray, " T"], rows: Int32[np.ndarray, " T"], padded: int) -> TokenBlock:
    """One sequence's tokens as a padded batch of one."""
    size = len(ids)
    block = TokenBlock(np.zeros((1, padded), np.int32), np.full((1, padded), -1, np.int32), np.array([size], np.int32))
    block.ids[0, :size], block.feature_rows[0, :size] = ids, rows
    return block


def sampling_params(options: GenerationOptions) -> SamplingParams:
    """A request's sampling as a batch of one; without a seed, one is drawn."""
    seed = secrets.randbits(63) if options.seed is None else options.seed
    # A seed is 64 bits; jax.random.key keeps 32 of them unless x64 is on, so the halves are folded in one after the other.
    key = jax.random.fold_in(jax.random.key(np.uint32(seed & 0xFFFFFFFF)), np.uint32((seed >> 32) & 0xFFFFFFFF))
    one = functools.partial(np.full, 1, dtype=np.float32)
    return SamplingParams(
        temperature=one(options.temperature),
        top_k=np.full(1, min(options.top_k, 2**31 - 1), np.int32),
        top_p=one(options.top_p),
        min_p=one(options.min_p),
        repetition_penalty=one(options.repetition_penalty),
        presence_penalty=one(options.presence_penalty),
        frequency_penalty=one(options.frequency_penalty),
        key=key[None],
    )


def steering_of(options: GenerationOptions, vocabulary: int) -> Steering | None:
    """What a request adds to its next token's scores, as a batch of one; None for nothing."""
    if not options.logit_bias and options.constraint is None:
        return None
    size = _power_of_two(len(options.logit_bias))
    ids, bias = np.full((1, size), vocabulary, np.int32), np.zeros((1, size), np.float32)
    for i, (token, value) in enumerate(options.logit_bias):
        ids[0, i], bias[0, i] = token, value
    everything = np.full(-(-vocabulary // 32), 0xFFFFFFFF, np.uint32)
    return Steering(ids, bias, (everything if options.constraint is None else options.constraint.mask())[None])


def _tokens(sampled: Sampled, logprobs: int | None) -> list[Token]:
    """The first row's sampled tokens, fetched from the device at once."""
    ids, own, top_ids, top = (x[0] for x in jax.device_get(tuple(sampled)))
    wanted = logprobs or 0
    tops = [tuple(zip(i[:wanted].tolist(), p[:wanted].tolist(), strict=True)) for i, p in zip(top_ids, top, strict=True)]
    return [Token(*token) for token in zip(ids.tolist(), own.tolist(), tops, strict=True)]


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
