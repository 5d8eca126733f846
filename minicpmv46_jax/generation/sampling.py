"""Sampling on the device: from logits to one token per row, independently of the other rows.

Order and meaning follow transformers' logits processors: repetition penalty over prompt and output, presence
and frequency penalties (OpenAI's definition) over the output, logit bias and mask, then temperature, top-k,
top-p, min-p. Temperature 0 takes the largest logit.
Glossary: B rows, S slots that have a history, V vocabulary, W words of a mask (V / 32), E biased tokens of a
slot, K reported alternatives.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt32

from kernels_pallas.backends import TPU
from kernels_pallas.top_k_top_p import sampling_threshold
from minicpmv46_jax.trees import tree_dataclass

MAX_LOGPROBS = 20  # alternatives a request may ask for, as in OpenAI's API
MAX_BIASED = 1024  # biased tokens of a request, as in OpenAI's API

# The sampling program of a step, static. "greedy" takes the largest logit. Each further mode adds to the one
# before: "sampled" temperature and mask; "filtered" penalties, min-p, top-k and top-p; "full" biases and log
# probabilities. Modes exist because each pass over the logits of a large batch takes a considerable part of a
# step. The choice is static: at a conditional on a GPU the host waits for the device.
SamplingMode = Literal["greedy", "sampled", "filtered", "full"]


@tree_dataclass
class SamplingParams:
    """Sampling options of each row.

    Attributes:
      temperature: 0 for greedy.
      top_k, min_p: 0 for off.
      top_p, repetition_penalty: 1 for off.
      presence_penalty, frequency_penalty: 0 for off.
      num_biased: number of valid entries in the row of `Bias`.
      seed: low word, high word.
    """

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]
    presence_penalty: Float32[Array, " B"]
    frequency_penalty: Float32[Array, " B"]
    num_biased: Int32[Array, " B"]
    seed: UInt32[Array, "B 2"]


@tree_dataclass
class History:
    """Token history for penalties: the tokens that occur in the prompt, and each token's count in the output.

    Only rows with penalties are up to date: see `record_prompt` and `record_token`.
    """

    in_prompt: Bool[Array, "S V"]
    counts: Int32[Array, "S V"]


@tree_dataclass
class Bias:
    """Logit biases. The first `SamplingParams.num_biased` entries of each row are valid."""

    ids: Int32[Array, "S E"]
    amounts: Float32[Array, "S E"]


class Sampled(NamedTuple):
    """One token per row; in mode "full" with log probabilities of the unmodified logits."""

    ids: Int32[Array, " B"]
    logprob: Float32[Array, " B"] | None = None
    top_ids: Int32[Array, "B K"] | None = None
    top_logprobs: Float32[Array, "B K"] | None = None


def new_history(sequences: int, vocabulary: int) -> History:
    """Creates the history of sequences without tokens."""
    return History(jnp.zeros((sequences, vocabulary), bool), jnp.zeros((sequences, vocabulary), jnp.int32))


def new_bias(sequences: int) -> Bias:
    """Creates the biases of sequences without any."""
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
    """Records a sequence's tokens: the first `prompt` of `ids` as prompt, those from there to `total` as
    output.

    With `fresh` the slot is cleared first; without it the tokens are added.
    """
    index, V = jnp.arange(ids.shape[0], dtype=jnp.int32), history.counts.shape[1]
    kept = jnp.where(fresh, 0, 1).astype(jnp.int32)
    in_prompt = (history.in_prompt[slot] & ~fresh).at[jnp.where(index < prompt, ids, V)].set(True, mode="drop")
    is_output = (index >= prompt) & (index < total)
    counts = (history.counts[slot] * kept).at[jnp.where(is_output, ids, V)].add(1, mode="drop")
    return History(history.in_prompt.at[slot].set(in_prompt), history.counts.at[slot].set(counts))


def record_token(history: History, slots: Int32[Array, " B"], ids: Int32[Array, " B"]) -> History:
    """Counts one output token per row; rows whose slot is past the last are dropped."""
    return History(history.in_prompt, history.counts.at[slots, ids].add(1, mode="drop"))


@jax.named_scope("sampling")
def sample(
    logits: Float32[Array, "B V"],
    params: SamplingParams,
    history: History,
    num_output_tokens: Int32[Array, " B"],
    mode: SamplingMode,
    bias: Bias | None = None,
    allowed: UInt32[Array, "B W"] | None = None,
    *,
    backend: str | None = None,
) -> Sampled:
    """Samples one token per row.

    The token depends on the row's seed and number of output tokens. It does not depend on the other rows or
    on the number of steps per dispatch.

    Args:
      logits: the model's logits.
      params: sampling options.
      history: token history of the rows.
      num_output_tokens: number of output tokens of each row so far.
      mode: the sampling program (static), at least `decoding.sampling_mode` of every row. A larger mode
        samples the same tokens.
      bias: logit biases of the rows; required in mode "full".
      allowed: mask of allowed tokens: bit i % 32 of word i // 32 is token i's. None for all.
      backend: as in `filter_scores` (static).
    """
    if mode == "greedy":
        assert allowed is None
        return Sampled(_argmax(logits))
    scores = apply_penalties(logits, params, history) if uses_history(mode) else logits
    scores = apply_bias(scores, bias, params.num_biased) if mode == "full" else scores
    scores = scores if allowed is None else apply_mask(scores, allowed)
    scaled = scores / jnp.maximum(params.temperature, 1e-6)[:, None]
    scaled = scaled if mode == "sampled" else filter_scores(scaled, params, backend=backend)
    keys = jax.vmap(jax.random.fold_in)(_row_keys(params.seed), num_output_tokens)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)  # Gumbel-max: the argmax is a sample
    ids = _argmax(jnp.where(params.temperature[:, None] > 0, scaled + noise, scores))
    if mode != "full":
        return Sampled(ids)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top_logprobs, top_ids = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
    own = jnp.take_along_axis(logprobs, ids[:, None], axis=1)[:, 0]
    return Sampled(ids, own, top_ids.astype(jnp.int32), top_logprobs)


def uses_history(mode: SamplingMode) -> bool:
    """Returns True if steps of this mode read and write histories."""
    return mode in ("filtered", "full")


def _argmax(scores: Float32[Array, "B V"]) -> Int32[Array, " B"]:
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _row_keys(seeds: UInt32[Array, "B 2"]) -> Key[Array, " B"]:
    """Makes a key of each 64-bit seed.

    jax.random.key keeps 32 bits unless x64 is on, so the high word is folded into the key of the low word.
    """
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed[0]), seed[1]))(seeds)


def apply_penalties(logits: Float32[Array, "B V"], params: SamplingParams, history: History) -> Float32[Array, "B V"]:
    """Applies repetition, presence and frequency penalties."""
    counts = history.counts.astype(jnp.float32)
    factor = jnp.where(history.in_prompt | (history.counts > 0), params.repetition_penalty[:, None], 1.0)
    scores = jnp.where(logits > 0, logits / factor, logits * factor)
    presence, frequency = params.presence_penalty[:, None], params.frequency_penalty[:, None]
    return scores - presence * jnp.minimum(counts, 1.0) - frequency * counts


def apply_bias(scores: Float32[Array, "B V"], bias: Bias, num_biased: Int32[Array, " B"]) -> Float32[Array, "B V"]:
    """Adds the first `num_biased` biases of each row to its scores."""
    (B, V), entries = scores.shape, jnp.arange(bias.ids.shape[1], dtype=jnp.int32)
    ids = jnp.where(entries[None] < num_biased[:, None], bias.ids, V)
    return scores.at[jnp.arange(B)[:, None], ids].add(bias.amounts, mode="drop")


def apply_mask(scores: Float32[Array, "B V"], allowed: UInt32[Array, "B W"]) -> Float32[Array, "B V"]:
    """Sets the scores of tokens that are not allowed to -inf."""
    bits = allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]
    may = (bits & jnp.uint32(1)).reshape(allowed.shape[0], -1)[:, : scores.shape[1]]
    return jnp.where(may == 1, scores, -jnp.inf)


def filter_scores(scores: Float32[Array, "B V"], params: SamplingParams, *, backend: str | None = None) -> Float32[Array, "B V"]:
    """Sets scores that min-p, top-k or top-p exclude to -inf; the best token always stays.

    Top-p keeps the fewest tokens whose probabilities (after top-k) sum to at least `top_p`. Tokens that tie
    with the last one kept stay too.

    Args:
      scores: scores after temperature, [B, V].
      params: sampling options.
      backend: as in `kernels_pallas.top_k_top_p.sampling_threshold`; "tpu" is the reference.
    """
    best = scores.max(axis=-1)
    kept = scores >= (best + jnp.log(params.min_p))[:, None]  # log 0 = -inf keeps all
    backend = None if backend == TPU else backend  # None is the reference on a TPU, for which there is no kernel
    kept &= scores >= sampling_threshold(scores, best, params.top_k, params.top_p, backend=backend)[:, None]
    return jnp.where(kept | (scores >= best[:, None]), scores, -jnp.inf)
