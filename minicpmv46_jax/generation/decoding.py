"""What a device carries from step to step, and the steps over it: start an answer, decode some tokens of many.

All that a step needs of a sequence lies on the device by its slot: pages, sampling, stop tokens, newest token. The host says no
more than which slots take part and which pages they have been given, so that it may be a step behind in what it knows.

Where the host has a say in a token (a mask that depends on the one before), a step is taken apart: `decode` computes the scores,
which needs no mask, and keeps them; `choose` samples from them. The mask is made in between, while the device computes.
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
    Mode,
    Sampled,
    SamplingParams,
    count,
    looks_back,
    new_bias,
    new_history,
    sample,
)
from minicpmv46_jax.model import Params
from minicpmv46_jax.model.batch import Rows, dropped
from minicpmv46_jax.model.state import Layers, TextState
from minicpmv46_jax.trees import tree_dataclass

DEVICE_STOPS = 16  # stop tokens the device looks out for; the host looks out for all


@tree_dataclass
class Decoding:
    """All slots. `left` is how many tokens an answer may still get; at 0 its row rests, as it does after a stop token.

    `kept`: scores of rows whose token is still to be chosen.
    """

    state: TextState
    sampling: SamplingParams
    stops: Int32[Array, "S E"]
    history: History
    bias: Bias
    kept: Float32[Array, "S V"]
    last: Int32[Array, " S"]
    answered: Int32[Array, " S"]
    left: Int32[Array, " S"]


@tree_dataclass
class Start:
    """Answers that begin, or go on after they were interrupted: their slots (-1: no row), and what is to be known of each.

    `answered` counts the tokens the answer has already, `left` those it may still get.
    """

    slots: Int32[Array, " B"]
    sampling: SamplingParams
    stops: Int32[Array, "B E"]
    answered: Int32[Array, " B"]
    left: Int32[Array, " B"]


def new_decoding(state: TextState, vocabulary: int) -> Decoding:
    """Slots in which no answer is."""
    S = state.lengths.shape[0]
    zeros = jnp.zeros(S, jnp.int32)
    params = SamplingParams(*[jnp.zeros(S, kind) for kind in _KINDS], seed=jnp.zeros((S, 2), jnp.uint32))
    stops = jnp.full((S, DEVICE_STOPS), -1, jnp.int32)
    kept = jnp.zeros((S, vocabulary), jnp.float32)
    return Decoding(state, params, stops, new_history(S, vocabulary), new_bias(S), kept, zeros, zeros, zeros)


def start(
    decoding: Decoding,
    logits: Float32[Array, "B V"],
    begin: Start,
    allowed: UInt32[Array, "B W"] | None = None,
    *,
    mode: Mode,
) -> tuple[Decoding, Sampled]:
    """Samples the next token of answers whose prompts have been read.

    Args:
      decoding: donated.
      logits: after each prompt's last token.
      begin: whose they are; rows without a slot sample too, for nothing.
      allowed: which tokens may come, see `sampling.sample`; None for all.
      mode: what to sample (static).
    """
    slots = dropped(begin.slots, decoding.last.shape[0])
    table = (decoding.sampling, decoding.stops, decoding.answered, decoding.left)
    new = (begin.sampling, begin.stops, begin.answered, begin.left)
    params, stops, answered, left = jax.tree.map(lambda old, x: old.at[slots].set(x, mode="drop"), table, new)
    begun = dataclasses.replace(decoding, sampling=params, stops=stops, answered=answered, left=left)
    return _sample(begun, logits, slots, allowed, mode)


def choose(
    decoding: Decoding, slots: Int32[Array, " B"], allowed: UInt32[Array, "B W"], *, mode: Mode
) -> tuple[Decoding, Sampled]:
    """Samples the tokens of rows that `decode` has held: from the scores that it kept, those that are allowed.

    Args:
      decoding: donated.
      slots: whose rows they are, -1 for none.
      allowed: which tokens may come, see `sampling.sample`.
      mode: what to sample (static).
    """
    rows = dropped(slots, decoding.last.shape[0])
    return _sample(decoding, _rows(decoding.kept, rows), rows, allowed, mode)


def _sample(
    decoding: Decoding,
    logits: Float32[Array, "B V"],
    slots: Int32[Array, " B"],
    allowed: UInt32[Array, "B W"] | None,
    mode: Mode,
) -> tuple[Decoding, Sampled]:
    """A token for each of these slots, entered."""
    known = (decoding.sampling, decoding.stops, decoding.history, decoding.bias, decoding.answered, decoding.left)
    params, stops, history, bias, answered, left = _rows(known, slots)
    sampled = sample(logits, params, history, answered, mode, bias, allowed)
    history = count(decoding.history, slots, sampled.ids) if looks_back(mode) else decoding.history
    table = (decoding.last, decoding.answered, decoding.left)
    new = (sampled.ids, answered + 1, jnp.where(is_stop(sampled.ids, stops), 0, left - 1))
    last, answered, left = jax.tree.map(lambda old, x: old.at[slots].set(x, mode="drop"), table, new)
    return dataclasses.replace(decoding, history=history, last=last, answered=answered, left=left), sampled


def decode(
    graph,
    params: Params,
    decoding: Decoding,
    slots: Int32[Array, " B"],
    pages: Int32[Array, "B 2"],
    held: Bool[Array, " B"] | None = None,
    *,
    steps: int,
    mode: Mode,
) -> tuple[Decoding, Sampled]:
    """The next `steps` tokens of some rows, in one loop on the device.

    The number of steps is static: on an H200 a loop that looks each time whether to go on took 1.53 ms a step, this one 1.46.

    Args:
      graph, params: the text backbone.
      decoding: donated.
      slots: whose rows they are, -1 for none. A row that has ended rests and repeats its last token.
      pages: for each row (place in its table, page) of a page it is given before the first step; page -1 for none.
      held: rows that get no token here: their scores are kept for `choose`, before which they may not come again. None: no row
        is, and `steps` may be more than 1.
      steps: static number N of tokens.
      mode: what to sample (static).

    Returns:
      The slots after it, and what was sampled, [B, N, ...]; of held rows it means nothing.
    """
    assert held is None or steps == 1
    rows = dropped(slots, decoding.last.shape[0])
    given = jnp.where(pages[:, 1] >= 0, rows, decoding.last.shape[0])
    tables = decoding.state.tables.at[given, pages[:, 0]].set(pages[:, 1], mode="drop")
    sampling, stops, bias, table = _rows((decoding.sampling, decoding.stops, decoding.bias, tables), rows)
    if held is not None:  # nothing is drawn for them
        sampling = dataclasses.replace(sampling, temperature=jnp.where(held, 0.0, sampling.temperature))

    def step(at: _At, _: None) -> tuple[_At, Sampled]:
        active = (slots >= 0) & (at.left > 0)
        batch = Rows(jnp.where(active, slots, -1), at.length, table)
        logits, layers = model.step(graph, params, at.layers, at.last, batch)
        gets = active if held is None else active & ~held
        kept = at.kept if held is None else _at_rows(at.kept, rows, active & held, logits)
        sampled = sample(logits, sampling, _rows(at.history, rows), at.answered, mode, bias)
        ids = jnp.where(gets, sampled.ids, at.last)
        history = count(at.history, jnp.where(gets, rows, decoding.last.shape[0]), ids) if looks_back(mode) else at.history
        more = gets.astype(jnp.int32)
        left = jnp.where(gets & is_stop(ids, stops), 0, at.left - more)
        length = at.length + active.astype(jnp.int32)
        return _At(layers, history, kept, ids, length, at.answered + more, left), sampled._replace(ids=ids)

    carried = (decoding.last, decoding.state.lengths, decoding.answered, decoding.left)
    at = _At(decoding.state.layers, decoding.history, decoding.kept, *_rows(carried, rows))
    at, sampled = jax.lax.scan(step, at, None, length=steps)
    new = (at.last, at.length, at.answered, at.left)
    last, lengths, answered, left = jax.tree.map(lambda old, x: old.at[rows].set(x, mode="drop"), carried, new)
    changed = {"history": at.history, "kept": at.kept, "last": last, "answered": answered, "left": left}
    decoding = dataclasses.replace(decoding, state=TextState(at.layers, tables, lengths), **changed)
    return decoding, jax.tree.map(lambda x: x.swapaxes(0, 1), sampled)


@tree_dataclass
class _At:
    """What the loop carries: everything of the layers, of the rest the rows taking part."""

    layers: Layers
    history: History
    kept: Float32[Array, "S V"]
    last: Int32[Array, " B"]
    length: Int32[Array, " B"]
    answered: Int32[Array, " B"]
    left: Int32[Array, " B"]


def _rows(tree, slots: Int32[Array, " B"]):
    """The entries of these slots; a slot past the last gives the last one's, which nobody may use."""
    return jax.tree.map(lambda x: x[jnp.minimum(slots, x.shape[0] - 1)], tree)


def _at_rows(
    kept: Float32[Array, "S V"], slots: Int32[Array, " B"], which: Bool[Array, " B"], new: Float32[Array, "B V"]
) -> Float32[Array, "S V"]:
    """With some of these rows at their slots."""
    return kept.at[jnp.where(which, slots, kept.shape[0])].set(new, mode="drop")


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


def mode_of(options: GenerationOptions) -> Mode:
    """The least that serves a request."""
    if options.logprobs is not None or options.logit_bias:
        return "full"
    draws = options.temperature > 0
    if penalises(options) or (draws and (options.top_k > 0 or options.top_p < 1 or options.min_p > 0)):
        return "filtered"
    return "sampled" if draws or options.constraint is not None else "greedy"


def penalises(options: GenerationOptions) -> bool:
    """Whether a request needs its history."""
    return options.repetition_penalty != 1.0 or options.presence_penalty != 0.0 or options.frequency_penalty != 0.0


def device_stops(stops) -> Int32[np.ndarray, " E"]:
    """As many stop tokens as the device looks out for, -1 where there are fewer."""
    out = np.full(DEVICE_STOPS, -1, np.int32)
    out[: min(len(stops), DEVICE_STOPS)] = sorted(stops)[:DEVICE_STOPS]
    return out
