"""From logits to a token, on the device and a row at a time independent of the others.

Order and meaning follow transformers' logits processors: repetition penalty over prompt and answer, presence and frequency
penalties (OpenAI's definition) over the answer, a request's bias and what it rules out, then temperature, top-k, top-p, min-p.
Temperature 0 takes the largest logit.
Glossary: B sequences, S sequences that a history is kept of, V vocabulary, W words of a mask (V / 32), E tokens with a bias,
K alternatives reported.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt32

from kernels_pallas.top_k_top_p import sampling_threshold
from minicpmv46_jax.trees import tree_dataclass

MAX_LOGPROBS = 20  # alternatives a request may ask for, as OpenAI's API
MAX_BIASED = 1024  # tokens with a bias of their own, as OpenAI's API

# What a step computes, static: the largest logit alone; a draw at a temperature, behind a mask; penalties, min-p, top-k and top-p
# too; biases and log probabilities too. At a batch of 100 the vocabulary is 100 MB of logits: each further pass over them costs a
# tenth of reading the weights. None of it is decided on the device: at a conditional the host waits for a GPU, and sends nothing
# ahead.
SamplingMode = Literal["greedy", "sampled", "filtered", "full"]


@tree_dataclass
class SamplingParams:
    """How each row is sampled. 0 switches top-k and min-p off, 1 top-p and the repetition penalty; seeds: low word, high word.

    `biased`: how many entries of its row of `Bias` count.
    """

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]
    presence_penalty: Float32[Array, " B"]
    frequency_penalty: Float32[Array, " B"]
    biased: Int32[Array, " B"]
    seed: UInt32[Array, "B 2"]


@tree_dataclass
class History:
    """What penalties look at: which tokens the prompt held, and how often the answer has used each.

    Only rows with penalties are kept up to date: see `record_prompt` and `record_token`.
    """

    in_prompt: Bool[Array, "S V"]
    counts: Int32[Array, "S V"]


@tree_dataclass
class Bias:
    """What requests add to the scores of some tokens. Of each row the first entries count, see `SamplingParams.biased`."""

    ids: Int32[Array, "S E"]
    amounts: Float32[Array, "S E"]


class Sampled(NamedTuple):
    """A token for each row; in mode "full" with the model's own log probabilities: before penalties, bias, mask, temperature."""

    ids: Int32[Array, " B"]
    logprob: Float32[Array, " B"] | None = None
    top_ids: Int32[Array, "B K"] | None = None
    top_logprobs: Float32[Array, "B K"] | None = None


def new_history(sequences: int, vocabulary: int) -> History:
    """Of sequences without a token."""
    return History(jnp.zeros((sequences, vocabulary), bool), jnp.zeros((sequences, vocabulary), jnp.int32))


def new_bias(sequences: int) -> Bias:
    """Of sequences without any."""
    shape = (sequences, MAX_BIASED)
    return Bias(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


def record_prompt(
    history: History,
    slot: Int32[Array, ""],
    ids: Int32[Array, " T"],
    prompt: Int32[Array, ""],
    total: Int32[Array, ""],
    fresh: Bool[Array, ""],
) -> History:
    """Enters a sequence's tokens: the first `prompt` of `ids` as its prompt's, those up to `total` as its answer's.

    `fresh` forgets what stood in the slot before; without it the tokens are added.
    """
    place, V = jnp.arange(ids.shape[0], dtype=jnp.int32), history.counts.shape[1]
    kept = jnp.where(fresh, 0, 1).astype(jnp.int32)
    in_prompt = (history.in_prompt[slot] & ~fresh).at[jnp.where(place < prompt, ids, V)].set(True, mode="drop")
    num_output_tokens = (place >= prompt) & (place < total)
    counts = (history.counts[slot] * kept).at[jnp.where(num_output_tokens, ids, V)].add(1, mode="drop")
    return History(history.in_prompt.at[slot].set(in_prompt), history.counts.at[slot].set(counts))


def record_token(history: History, slots: Int32[Array, " B"], ids: Int32[Array, " B"]) -> History:
    """Counts a token for each row; rows whose slot is past the last are left out."""
    return History(history.in_prompt, history.counts.at[slots, ids].add(1, mode="drop"))


def sample(
    logits: Float32[Array, "B V"],
    params: SamplingParams,
    history: History,
    num_output_tokens: Int32[Array, " B"],
    mode: SamplingMode,
    bias: Bias | None = None,
    allowed: UInt32[Array, "B W"] | None = None,
) -> Sampled:
    """Draws one token a row.

    It depends on the row's seed and on how many tokens its answer has, not on the other rows or on how steps are dispatched.

    Args:
      logits: the model's scores.
      params: how to sample.
      history: what penalties look at, of these rows.
      num_output_tokens: tokens each row's answer has.
      mode: what to compute (static), at least what the rows' `decoding.sampling_mode` asks for; more gives the same tokens.
      bias: of these rows; needed in mode "full".
      allowed: which tokens may come: bit i % 32 of word i // 32 is token i's. None for all.
    """
    if mode == "greedy":
        assert allowed is None
        return Sampled(_best(logits))
    scores = penalise(logits, params, history) if uses_history(mode) else logits
    scores = add_bias(scores, bias, params.biased) if mode == "full" else scores
    scores = scores if allowed is None else rule_out(scores, allowed)
    kept = scores / jnp.maximum(params.temperature, 1e-6)[:, None]
    kept = kept if mode == "sampled" else filter_scores(kept, params)
    keys = jax.vmap(jax.random.fold_in)(_keys(params.seed), num_output_tokens)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)  # whose largest sum is a draw
    ids = _best(jnp.where(params.temperature[:, None] > 0, kept + noise, scores))
    if mode != "full":
        return Sampled(ids)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top_logprobs, top_ids = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
    own = jnp.take_along_axis(logprobs, ids[:, None], axis=1)[:, 0]
    return Sampled(ids, own, top_ids.astype(jnp.int32), top_logprobs)


def uses_history(mode: SamplingMode) -> bool:
    """Whether a step of that mode reads and writes histories; of rows that have penalties every step is."""
    return mode in ("filtered", "full")


def _best(scores: Float32[Array, "B V"]) -> Int32[Array, " B"]:
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _keys(seeds: UInt32[Array, "B 2"]) -> Key[Array, " B"]:
    """A seed is 64 bits; jax.random.key keeps 32 of them unless x64 is on, so the halves are folded in one after the other."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed[0]), seed[1]))(seeds)


def penalise(logits: Float32[Array, "B V"], params: SamplingParams, history: History) -> Float32[Array, "B V"]:
    """Logits after the three penalties."""
    counts = history.counts.astype(jnp.float32)
    factor = jnp.where(history.in_prompt | (history.counts > 0), params.repetition_penalty[:, None], 1.0)
    scores = jnp.where(logits > 0, logits / factor, logits * factor)
    presence, frequency = params.presence_penalty[:, None], params.frequency_penalty[:, None]
    return scores - presence * jnp.minimum(counts, 1.0) - frequency * counts


def add_bias(scores: Float32[Array, "B V"], bias: Bias, biased: Int32[Array, " B"]) -> Float32[Array, "B V"]:
    """Scores with each row's first `biased` entries added."""
    (B, V), entries = scores.shape, jnp.arange(bias.ids.shape[1], dtype=jnp.int32)
    ids = jnp.where(entries[None] < biased[:, None], bias.ids, V)
    return scores.at[jnp.arange(B)[:, None], ids].add(bias.amounts, mode="drop")


def rule_out(scores: Float32[Array, "B V"], allowed: UInt32[Array, "B W"]) -> Float32[Array, "B V"]:
    """Scores, -inf for what may not come."""
    bits = allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]
    may = (bits & jnp.uint32(1)).reshape(allowed.shape[0], -1)[:, : scores.shape[1]]
    return jnp.where(may == 1, scores, -jnp.inf)


def filter_scores(scores: Float32[Array, "B V"], params: SamplingParams) -> Float32[Array, "B V"]:
    """Scores with -inf where min-p, top-k or top-p rule a token out; the best token always stays.

    Top-p keeps the fewest tokens whose probabilities (after top-k) reach it. Tokens that tie with the last one kept stay too.
    """
    best = scores.max(axis=-1)
    kept = scores >= (best + jnp.log(params.min_p))[:, None]  # log 0 = -inf keeps all
    kept &= scores >= sampling_threshold(scores, best, params.top_k, params.top_p)[:, None]
    return jnp.where(kept | (scores >= best[:, None]), scores, -jnp.inf)
