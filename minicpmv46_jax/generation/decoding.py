"""The decode state that stays on the device, and the steps over it: sample a first token, decode several
rows.

The device keeps everything that a step needs by slot: pages, sampling options, stop tokens, the newest token.
The host only passes the slots that take part and their new pages, so it can run one step behind the device.

Some masks depend on the token before. Such a step has two parts: `decode` computes the logits, which needs no
mask, and keeps them in `held_logits`; `sample_held` samples from them. The host makes the mask while the
device computes.
Glossary: S slots, B rows of a step, E stop tokens per slot, N steps per dispatch, T tokens, V vocabulary,
W words of a mask.
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

NUM_DEVICE_STOPS = 16  # stop tokens that the device compares with; the host compares with all


@tree_dataclass
class DecodeState:
    """Decode state of all slots.

    Attributes:
      state: layer states, block tables and sequence lengths.
      sampling: sampling options.
      stop_ids: stop token ids that the device compares with; -1 for none.
      history: tokens of the prompt and of the output, for penalties.
      bias: logit biases.
      held_logits: logits of rows whose token `sample_held` has yet to sample.
      last_ids: newest token id.
      num_output_tokens: number of output tokens so far.
      tokens_left: number of output tokens still allowed. At 0, also after a stop token, the row is inactive.
    """

    state: TextState
    sampling: SamplingParams
    stop_ids: Int32[Array, "S E"]
    history: History
    bias: Bias
    held_logits: Float32[Array, "S V"]
    last_ids: Int32[Array, " S"]
    num_output_tokens: Int32[Array, " S"]
    tokens_left: Int32[Array, " S"]


@tree_dataclass
class FirstTokenInput:
    """Requests whose prefill is complete, also after a preemption.

    Attributes:
      slots: -1 for an unused row.
      sampling, stop_ids: as in `DecodeState`.
      num_output_tokens: number of output tokens so far; above 0 after a preemption.
      tokens_left: number of output tokens still allowed.
    """

    slots: Int32[Array, " B"]
    sampling: SamplingParams
    stop_ids: Int32[Array, "B E"]
    num_output_tokens: Int32[Array, " B"]
    tokens_left: Int32[Array, " B"]


def new_decode_state(state: TextState, vocabulary: int) -> DecodeState:
    """Creates the decode state of slots without requests."""
    S = state.seq_lens.shape[0]
    zeros = jnp.zeros(S, jnp.int32)
    params = SamplingParams(*[jnp.zeros(S, dtype) for dtype in _FIELD_DTYPES], seed=jnp.zeros((S, 2), jnp.uint32))
    stop_ids = jnp.full((S, NUM_DEVICE_STOPS), -1, jnp.int32)
    held_logits = jnp.zeros((S, vocabulary), jnp.float32)
    return DecodeState(state, params, stop_ids, new_history(S, vocabulary), new_bias(S), held_logits, zeros, zeros, zeros)


def sample_first(
    decode_state: DecodeState,
    logits: Float32[Array, "B V"],
    inputs: FirstTokenInput,
    allowed: UInt32[Array, "B W"] | None = None,
    *,
    mode: SamplingMode,
    backend: str | None = None,
) -> tuple[DecodeState, Sampled]:
    """Samples the next token of requests whose prefill is complete.

    Args:
      decode_state: donated.
      logits: logits after each prompt's last token.
      inputs: the requests of the rows. Unused rows are sampled too; their tokens are undefined.
      allowed: mask of allowed tokens, see `sampling.sample`; None for all.
      mode: the sampling program (static).
      backend: as in `sampling.filter_scores` (static).

    Returns:
      The new decode state, and the tokens, [B].
    """
    slots = scatter_index(inputs.slots, decode_state.last_ids.shape[0])
    old = (decode_state.sampling, decode_state.stop_ids, decode_state.num_output_tokens, decode_state.tokens_left)
    new = (inputs.sampling, inputs.stop_ids, inputs.num_output_tokens, inputs.tokens_left)
    params, stop_ids, num_output_tokens, tokens_left = _scatter_rows(old, slots, new)
    decode_state = dataclasses.replace(
        decode_state, sampling=params, stop_ids=stop_ids, num_output_tokens=num_output_tokens, tokens_left=tokens_left
    )
    return _sample_rows(decode_state, logits, slots, allowed, mode, backend)


def sample_held(
    decode_state: DecodeState,
    slots: Int32[Array, " B"],
    allowed: UInt32[Array, "B W"],
    *,
    mode: SamplingMode,
    backend: str | None = None,
) -> tuple[DecodeState, Sampled]:
    """Samples the tokens of held rows from the logits that `decode` kept.

    Args:
      decode_state: donated.
      slots: the rows' slots; -1 for an unused row.
      allowed: mask of allowed tokens, see `sampling.sample`.
      mode: the sampling program (static).
      backend: as in `sampling.filter_scores` (static).

    Returns:
      The new decode state, and the tokens, [B].
    """
    rows = scatter_index(slots, decode_state.last_ids.shape[0])
    logits = _gather_rows(decode_state.held_logits, rows)
    return _sample_rows(decode_state, logits, rows, allowed, mode, backend)


def _sample_rows(
    decode_state: DecodeState,
    logits: Float32[Array, "B V"],
    slots: Int32[Array, " B"],
    allowed: UInt32[Array, "B W"] | None,
    mode: SamplingMode,
    backend: str | None,
) -> tuple[DecodeState, Sampled]:
    """Samples a token for each of these slots and records it in the decode state."""
    known = (
        decode_state.sampling,
        decode_state.stop_ids,
        decode_state.history,
        decode_state.bias,
        decode_state.num_output_tokens,
        decode_state.tokens_left,
    )
    params, stop_ids, history, bias, num_output_tokens, tokens_left = _gather_rows(known, slots)
    sampled = sample(logits, params, history, num_output_tokens, mode, bias, allowed, backend=backend)
    history = record_token(decode_state.history, slots, sampled.ids) if uses_history(mode) else decode_state.history
    old = (decode_state.last_ids, decode_state.num_output_tokens, decode_state.tokens_left)
    new = (sampled.ids, num_output_tokens + 1, jnp.where(is_stop(sampled.ids, stop_ids), 0, tokens_left - 1))
    last_ids, num_output_tokens, tokens_left = _scatter_rows(old, slots, new)
    return dataclasses.replace(
        decode_state, history=history, last_ids=last_ids, num_output_tokens=num_output_tokens, tokens_left=tokens_left
    ), sampled


def decode(
    graph,
    params: Params,
    decode_state: DecodeState,
    slots: Int32[Array, " B"],
    new_pages: Int32[Array, "B 2"],
    held: Bool[Array, " B"] | None = None,
    *,
    steps: int,
    mode: SamplingMode,
    backend: str | None = None,
) -> tuple[DecodeState, Sampled]:
    """Decodes the next `steps` tokens of some rows, in one loop on the device.

    The number of steps is static, because a loop with a condition makes each step slower.

    Args:
      graph, params: the text backbone.
      decode_state: donated.
      slots: the rows' slots; -1 for an unused row. A row that has ended repeats its last token.
      new_pages: (index in the block table, page) that each row gets before the first step; page -1 for none.
      held: rows without a sampled token in this call; `sample_held` samples it from their held logits before
        the row's next `decode`. None: no row is held, and `steps` may be more than 1.
      steps: number N of tokens (static).
      mode: the sampling program (static).
      backend: as in `sampling.filter_scores` (static).

    Returns:
      The new decode state, and the tokens, [B, N, ...]; those of held rows are undefined.
    """
    assert held is None or steps == 1
    num_slots = decode_state.last_ids.shape[0]
    rows = scatter_index(slots, num_slots)
    with_page = jnp.where(new_pages[:, 1] >= 0, rows, num_slots)
    block_tables = decode_state.state.block_tables.at[with_page, new_pages[:, 0]].set(new_pages[:, 1], mode="drop")
    known = (decode_state.sampling, decode_state.stop_ids, decode_state.bias, block_tables)
    sampling, stop_ids, bias, row_tables = _gather_rows(known, rows)
    if held is not None:  # greedy, because the token is discarded
        sampling = dataclasses.replace(sampling, temperature=jnp.where(held, 0.0, sampling.temperature))

    def step(carry: _LoopCarry, _: None) -> tuple[_LoopCarry, Sampled]:
        active = (slots >= 0) & (carry.tokens_left > 0)
        batch = DecodeBatch(jnp.where(active, slots, -1), carry.seq_lens, row_tables)
        logits, layers = model.decode_step(graph, params, carry.layers, carry.last_ids, batch)
        gets_token = active if held is None else active & ~held
        held_logits = carry.held_logits
        if held is not None:
            held_logits = held_logits.at[jnp.where(active & held, rows, num_slots)].set(logits, mode="drop")
        row_history = _gather_rows(carry.history, rows)
        sampled = sample(logits, sampling, row_history, carry.num_output_tokens, mode, bias, backend=backend)
        ids = jnp.where(gets_token, sampled.ids, carry.last_ids)
        history = carry.history
        if uses_history(mode):
            history = record_token(history, jnp.where(gets_token, rows, num_slots), ids)
        one = gets_token.astype(jnp.int32)
        tokens_left = jnp.where(gets_token & is_stop(ids, stop_ids), 0, carry.tokens_left - one)
        seq_lens = carry.seq_lens + active.astype(jnp.int32)
        num_output_tokens = carry.num_output_tokens + one
        carry = _LoopCarry(layers, history, held_logits, ids, seq_lens, num_output_tokens, tokens_left)
        return carry, sampled._replace(ids=ids)

    old = (decode_state.last_ids, decode_state.state.seq_lens, decode_state.num_output_tokens, decode_state.tokens_left)
    carry = _LoopCarry(decode_state.state.layers, decode_state.history, decode_state.held_logits, *_gather_rows(old, rows))
    carry, sampled = jax.lax.scan(step, carry, None, length=steps)
    new = (carry.last_ids, carry.seq_lens, carry.num_output_tokens, carry.tokens_left)
    last_ids, seq_lens, num_output_tokens, tokens_left = _scatter_rows(old, rows, new)
    changed = {
        "history": carry.history,
        "held_logits": carry.held_logits,
        "last_ids": last_ids,
        "num_output_tokens": num_output_tokens,
        "tokens_left": tokens_left,
    }
    decode_state = dataclasses.replace(decode_state, state=TextState(carry.layers, block_tables, seq_lens), **changed)
    return decode_state, jax.tree.map(lambda x: x.swapaxes(0, 1), sampled)


@tree_dataclass
class _LoopCarry:
    """Values that change from step to step: layers, history and held logits per slot, others per row."""

    layers: Layers
    history: History
    held_logits: Float32[Array, "S V"]
    last_ids: Int32[Array, " B"]
    seq_lens: Int32[Array, " B"]
    num_output_tokens: Int32[Array, " B"]
    tokens_left: Int32[Array, " B"]


def _gather_rows(tree, slots: Int32[Array, " B"]):
    """Returns the entries of these slots; a slot past the last yields undefined values."""
    return jax.tree.map(lambda x: x[jnp.minimum(slots, x.shape[0] - 1)], tree)


def _scatter_rows(tree, slots: Int32[Array, " B"], rows):
    """Writes rows to these slots; a slot past the last is dropped."""
    return jax.tree.map(lambda x, new: x.at[slots].set(new, mode="drop"), tree, rows)


def is_stop(ids: Int32[Array, " B"], stop_ids: Int32[Array, "B E"]) -> Bool[Array, " B"]:
    """Returns True for rows whose token is one of the row's stop tokens."""
    return (ids[:, None] == stop_ids).any(axis=1)


_FIELD_DTYPES = tuple(np.dtype(dtype) for dtype in "f4 i4 f4 f4 f4 f4 f4 i4".split())  # of SamplingParams, but the seed


def sampling_params(options: list[GenerationOptions], seeds: list[int]) -> SamplingParams:
    """Returns the sampling options of requests, one row each."""
    values = [
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
    columns = zip(_FIELD_DTYPES, zip(*values, strict=True), strict=True)
    words = np.array([(seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF) for seed in seeds], np.uint32)
    return SamplingParams(*[np.array(column, dtype) for dtype, column in columns], seed=words)


def bias_row(options: GenerationOptions) -> tuple[Int32[np.ndarray, " E"], Float32[np.ndarray, " E"]]:
    """Returns a request's row of `Bias`: token ids and amounts."""
    ids, amounts = np.zeros(MAX_BIASED, np.int32), np.zeros(MAX_BIASED, np.float32)
    for i, (token, amount) in enumerate(options.logit_bias):
        ids[i], amounts[i] = token, amount
    return ids, amounts


def set_bias(bias: Bias, slot: Int32[Array, ""], ids: Int32[Array, " E"], amounts: Float32[Array, " E"]) -> Bias:
    """Replaces a slot's row; `bias` is donated."""
    return Bias(bias.ids.at[slot].set(ids), bias.amounts.at[slot].set(amounts))


def sampling_mode(options: GenerationOptions) -> SamplingMode:
    """Returns the cheapest mode that computes everything that a request needs."""
    if options.logprobs is not None or options.logit_bias:
        return "full"
    draws = options.temperature > 0
    if has_penalties(options) or (draws and (options.top_k > 0 or options.top_p < 1 or options.min_p > 0)):
        return "filtered"
    return "sampled" if draws or options.constraint is not None else "greedy"


def has_penalties(options: GenerationOptions) -> bool:
    """Returns True if a request needs its token history."""
    return options.repetition_penalty != 1.0 or options.presence_penalty != 0.0 or options.frequency_penalty != 0.0


def device_stop_ids(stop_ids) -> Int32[np.ndarray, " E"]:
    """Returns the lowest NUM_DEVICE_STOPS stop token ids, padded with -1."""
    out = np.full(NUM_DEVICE_STOPS, -1, np.int32)
    out[: min(len(stop_ids), NUM_DEVICE_STOPS)] = sorted(stop_ids)[:NUM_DEVICE_STOPS]
    return out
