"""What a device carries from step to step, and the steps over it: start an answer, decode some tokens of many.

All that a step needs of a sequence lies on the device by its slot: pages, sampling, stop tokens, newest token. The host says no
more than which slots take part and which pages they have been given, so that it may be a step behind in what it knows.

Where the host has a say in a token (a mask that depends on the one before), a step is taken apart: `decode` computes the scores,
which needs no mask, and keeps them; `sample_held` samples from them. The mask is made in between, while the device computes.
Glossary: S slots, B rows of a step, E stop tokens watched, N steps of a dispatch, T tokens, V vocabulary, W words of a mask.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from minicpmv46_jax import model
from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.generation.sampling import (
    MAX_BIASED,
    Bias,
    History,
    Sampled,
    SamplingMode,
    SamplingParams,
    new_bias,
    new_history,
    record_token,
    sample,
    uses_history,
)
from minicpmv46_jax.model import Params
from minicpmv46_jax.model.batch import DecodeBatch, scatter_index
from minicpmv46_jax.model.state import Layers, TextState
from minicpmv46_jax.trees import tree_dataclass

NUM_DEVICE_STOPS = 16  # stop tokens the device looks out for; the host looks out for all


@tree_dataclass
class DecodeState:
    """All slots. `tokens_left` is how many tokens an answer may still get; at 0 its row rests, as it does after a stop token.

    `held_logits`: scores of rows whose token is still to be chosen.
    """

    state: TextState
    sampling: SamplingParams
    stops: Int32[Array, "S E"]
    history: History
    bias: Bias
    held_logits: Float32[Array, "S V"]
    last: Int32[Array, " S"]
    num_output_tokens: Int32[Array, " S"]
    tokens_left: Int32[Array, " S"]


@tree_dataclass
class FirstTokenInput:
    """Answers that begin, or go on after they were interrupted: their slots (-1: no row), and what is to be known of each.

    `num_output_tokens` counts the tokens the answer has already, `tokens_left` those it may still get.
    """

    slots: Int32[Array, " B"]
    sampling: SamplingParams
    stops: Int32[Array, "B E"]
    num_output_tokens: Int32[Array, " B"]
    tokens_left: Int32[Array, " B"]


def new_decode_state(state: TextState, vocabulary: int) -> DecodeState:
    """Slots in which no answer is."""
    S = state.seq_lens.shape[0]
    zeros = jnp.zeros(S, jnp.int32)
    params = SamplingParams(*[jnp.zeros(S, kind) for kind in _KINDS], seed=jnp.zeros((S, 2), jnp.uint32))
    stops = jnp.full((S, NUM_DEVICE_STOPS), -1, jnp.int32)
    held_logits = jnp.zeros((S, vocabulary), jnp.float32)
    return DecodeState(state, params, stops, new_history(S, vocabulary), new_bias(S), held_logits, zeros, zeros, zeros)


def sample_first(
    decode_state: DecodeState,
    logits: Float32[Array, "B V"],
    begin: FirstTokenInput,
    allowed: UInt32[Array, "B W"] | None = None,
    *,
    mode: SamplingMode,
) -> tuple[DecodeState, Sampled]:
    """Samples the next token of answers whose prompts have been read.

    Args:
      decode_state: donated.
      logits: after each prompt's last token.
      begin: whose they are; rows without a slot sample too, for nothing.
      allowed: which tokens may come, see `sampling.sample`; None for all.
      mode: what to sample (static).
    """
    slots = scatter_index(begin.slots, decode_state.last.shape[0])
    table = (decode_state.sampling, decode_state.stops, decode_state.num_output_tokens, decode_state.tokens_left)
    new = (begin.sampling, begin.stops, begin.num_output_tokens, begin.tokens_left)
    params, stops, num_output_tokens, tokens_left = jax.tree.map(lambda old, x: old.at[slots].set(x, mode="drop"), table, new)
    begun = dataclasses.replace(
        decode_state, sampling=params, stops=stops, num_output_tokens=num_output_tokens, tokens_left=tokens_left
    )
    return _sample(begun, logits, slots, allowed, mode)


def sample_held(
    decode_state: DecodeState, slots: Int32[Array, " B"], allowed: UInt32[Array, "B W"], *, mode: SamplingMode
) -> tuple[DecodeState, Sampled]:
    """Samples the tokens of rows that `decode` has held: from the scores that it kept, those that are allowed.

    Args:
      decode_state: donated.
      slots: whose rows they are, -1 for none.
      allowed: which tokens may come, see `sampling.sample`.
      mode: what to sample (static).
    """
    rows = scatter_index(slots, decode_state.last.shape[0])
    return _sample(decode_state, _rows(decode_state.held_logits, rows), rows, allowed, mode)


def _sample(
    decode_state: DecodeState,
    logits: Float32[Array, "B V"],
    slots: Int32[Array, " B"],
    allowed: UInt32[Array, "B W"] | None,
    mode: SamplingMode,
) -> tuple[DecodeState, Sampled]:
    """A token for each of these slots, entered."""
    known = (
        decode_state.sampling,
        decode_state.stops,
        decode_state.history,
        decode_state.bias,
        decode_state.num_output_tokens,
        decode_state.tokens_left,
    )
    params, stops, history, bias, num_output_tokens, tokens_left = _rows(known, slots)
    sampled = sample(logits, params, history, num_output_tokens, mode, bias, allowed)
    history = record_token(decode_state.history, slots, sampled.ids) if uses_history(mode) else decode_state.history
    table = (decode_state.last, decode_state.num_output_tokens, decode_state.tokens_left)
    new = (sampled.ids, num_output_tokens + 1, jnp.where(is_stop(sampled.ids, stops), 0, tokens_left - 1))
    last, num_output_tokens, tokens_left = jax.tree.map(lambda old, x: old.at[slots].set(x, mode="drop"), table, new)
    return dataclasses.replace(
        decode_state, history=history, last=last, num_output_tokens=num_output_tokens, tokens_left=tokens_left
    ), sampled


def decode(
    graph,
    params: Params,
    decode_state: DecodeState,
    slots: Int32[Array, " B"],
    pages: Int32[Array, "B 2"],
    held: Bool[Array, " B"] | None = None,
    *,
    steps: int,
    mode: SamplingMode,
) -> tuple[DecodeState, Sampled]:
    """The next `steps` tokens of some rows, in one loop on the device.

    The number of steps is static: on an H200 a loop that looks each time whether to go on took 1.53 ms a step, this one 1.46.

    Args:
      graph, params: the text backbone.
      decode_state: donated.
      slots: whose rows they are, -1 for none. A row that has ended rests and repeats its last token.
      pages: for each row (place in its table, page) of a page it is given before the first step; page -1 for none.
      held: rows that get no token here; `sample_held` draws it from their held logits, before the next `decode` of that row.
        None: no row is held, and `steps` may be more than 1.
      steps: static number N of tokens.
      mode: what to sample (static).

    Returns:
      The slots after it, and what was sampled, [B, N, ...]; of held rows it means nothing.
    """
    assert held is None or steps == 1
    rows = scatter_index(slots, decode_state.last.shape[0])
    given = jnp.where(pages[:, 1] >= 0, rows, decode_state.last.shape[0])
    tables = decode_state.state.block_tables.at[given, pages[:, 0]].set(pages[:, 1], mode="drop")
    sampling, stops, bias, table = _rows((decode_state.sampling, decode_state.stops, decode_state.bias, tables), rows)
    if held is not None:  # nothing is drawn for them
        sampling = dataclasses.replace(sampling, temperature=jnp.where(held, 0.0, sampling.temperature))

    def step(at: _At, _: None) -> tuple[_At, Sampled]:
        active = (slots >= 0) & (at.tokens_left > 0)
        batch = DecodeBatch(jnp.where(active, slots, -1), at.length, table)
        logits, layers = model.decode_step(graph, params, at.layers, at.last, batch)
        gets = active if held is None else active & ~held
        held_logits = at.held_logits if held is None else _at_rows(at.held_logits, rows, active & held, logits)
        sampled = sample(logits, sampling, _rows(at.history, rows), at.num_output_tokens, mode, bias)
        ids = jnp.where(gets, sampled.ids, at.last)
        history = (
            record_token(at.history, jnp.where(gets, rows, decode_state.last.shape[0]), ids) if uses_history(mode) else at.history
        )
        more = gets.astype(jnp.int32)
        tokens_left = jnp.where(gets & is_stop(ids, stops), 0, at.tokens_left - more)
        length = at.length + active.astype(jnp.int32)
        return _At(layers, history, held_logits, ids, length, at.num_output_tokens + more, tokens_left), sampled._replace(ids=ids)

    carried = (decode_state.last, decode_state.state.seq_lens, decode_state.num_output_tokens, decode_state.tokens_left)
    at = _At(decode_state.state.layers, decode_state.history, decode_state.held_logits, *_rows(carried, rows))
    at, sampled = jax.lax.scan(step, at, None, length=steps)
    new = (at.last, at.length, at.num_output_tokens, at.tokens_left)
    last, lengths, num_output_tokens, tokens_left = jax.tree.map(lambda old, x: old.at[rows].set(x, mode="drop"), carried, new)
    changed = {
        "history": at.history,
        "held_logits": at.held_logits,
        "last": last,
        "num_output_tokens": num_output_tokens,
        "tokens_left": tokens_left,
    }
    decode_state = dataclasses.replace(decode_state, state=TextState(at.layers, tables, lengths), **changed)
    return decode_state, jax.tree.map(lambda x: x.swapaxes(0, 1), sampled)


@tree_dataclass
class _At:
    """What the loop carries: everything of the layers, of the rest the rows taking part."""

    layers: Layers
    history: History
    held_logits: Float32[Array, "S V"]
    last: Int32[Array, " B"]
    length: Int32[Array, " B"]
    num_output_tokens: Int32[Array, " B"]
    tokens_left: Int32[Array, " B"]


def _rows(tree, slots: Int32[Array, " B"]):
    """The entries of these slots; a slot past the last gives the last one's, which nobody may use."""
    return jax.tree.map(lambda x: x[jnp.minimum(slots, x.shape[0] - 1)], tree)


def _at_rows(
    held_logits: Float32[Array, "S V"], slots: Int32[Array, " B"], which: Bool[Array, " B"], new: Float32[Array, "B V"]
) -> Float32[Array, "S V"]:
    """With some of these rows at their slots."""
    return held_logits.at[jnp.where(which, slots, held_logits.shape[0])].set(new, mode="drop")


def is_stop(ids: Int32[Array, " B"], stops: Int32[Array, "B E"]) -> Bool[Array, " B"]:
    """Which rows have sampled a token that ends them."""
    return (ids[:, None] == stops).any(axis=1)


_KINDS = tuple(np.dtype(kind) for kind in "f4 i4 f4 f4 f4 f4 f4 i4".split())  # of SamplingParams' fields but the seed


def sampling_params(options: list[GenerationOptions], seeds: list[int]) -> SamplingParams:
    """Requests' sampling, a row each."""
    wished = [
        (
            o.temperature,
            min(o.top_k, 2**31 - 1),
            o.top_p,
            o.min_p,
            o.repetition_penalty,
            o.presence_penalty,
            o.frequency_penalty,
            len(o.logit_bias),
        )
        for o in options
    ]
    columns = zip(_KINDS, zip(*wished, strict=True), strict=True)
    halves = np.array([(seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF) for seed in seeds], np.uint32)
    return SamplingParams(*[np.array(column, kind) for kind, column in columns], seed=halves)


def bias_row(options: GenerationOptions) -> tuple[Int32[np.ndarray, " E"], Float32[np.ndarray, " E"]]:
    """A request's row of `Bias`."""
    ids, amounts = np.zeros(MAX_BIASED, np.int32), np.zeros(MAX_BIASED, np.float32)
    for i, (token, amount) in enumerate(options.logit_bias):
        ids[i], amounts[i] = token, amount
    return ids, amounts


def set_bias(bias: Bias, slot: Int32[Array, ""], ids: Int32[Array, " E"], amounts: Float32[Array, " E"]) -> Bias:
    """With a slot's row replaced; `bias` is donated."""
    return Bias(bias.ids.at[slot].set(ids), bias.amounts.at[slot].set(amounts))


def sampling_mode(options: GenerationOptions) -> SamplingMode:
    """The least that serves a request."""
    if options.logprobs is not None or options.logit_bias:
        return "full"
    draws = options.temperature > 0
    if has_penalties(options) or (draws and (options.top_k > 0 or options.top_p < 1 or options.min_p > 0)):
        return "filtered"
    return "sampled" if draws or options.constraint is not None else "greedy"


def has_penalties(options: GenerationOptions) -> bool:
    """Whether a request needs its history."""
    return options.repetition_penalty != 1.0 or options.presence_penalty != 0.0 or options.frequency_penalty != 0.0


def device_stop_ids(stops) -> Int32[np.ndarray, " E"]:
    """As many stop tokens as the device looks out for, -1 where there are fewer."""
    out = np.full(NUM_DEVICE_STOPS, -1, np.int32)
    out[: min(len(stops), NUM_DEVICE_STOPS)] = sorted(stops)[:NUM_DEVICE_STOPS]
    return out
