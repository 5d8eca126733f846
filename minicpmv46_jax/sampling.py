"""From logits to a token, on the device and a row at a time independent of the others.

Order and meaning follow transformers' logits processors: repetition penalty over prompt and answer, presence and frequency
penalties (OpenAI's definition) over the answer, a request's bias and what it rules out, then temperature, top-k, top-p, min-p.
Temperature 0 takes the largest logit.
Glossary: B sequences, V vocabulary, K alternatives reported.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt32

from minicpmv46_jax.trees import tree_dataclass

MAX_LOGPROBS = 20  # alternatives a request may ask for, as OpenAI's API


@tree_dataclass
class SamplingParams:
    """How each row is sampled. 0 switches top-k and min-p off, 1 top-p and the repetition penalty."""

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]
    presence_penalty: Float32[Array, " B"]
    frequency_penalty: Float32[Array, " B"]
    key: Key[Array, " B"]


@tree_dataclass
class History:
    """What penalties look at: which tokens the prompt held, and how often the answer has used each."""

    in_prompt: Bool[Array, "B V"]
    counts: Int32[Array, "B V"]


@tree_dataclass
class Steering:
    """What a request adds to the scores: a bias for some tokens (id V for none), and which may come at all.

    Bit i % 32 of word i // 32 of `allowed` is token i's.
    """

    bias_ids: Int32[Array, "B N"]
    bias: Float32[Array, "B N"]
    allowed: UInt32[Array, "B W"]


class Sampled(NamedTuple):
    """A token for each row, and the log probabilities of the model itself (before penalties and temperature)."""

    ids: Int32[Array, " B"]
    logprob: Float32[Array, " B"]
    top_ids: Int32[Array, "B K"]
    top_logprobs: Float32[Array, "B K"]


def new_history(prompt_ids: Int32[Array, "B T"], num_valid: Int32[Array, " B"], vocab_size: int) -> History:
    """The history before the first answer token; padding in `prompt_ids` does not count."""
    B, T = prompt_ids.shape
    ids = jnp.where(jnp.arange(T)[None] < num_valid[:, None], prompt_ids, vocab_size)
    in_prompt = jnp.zeros((B, vocab_size), bool).at[jnp.arange(B)[:, None], ids].set(True, mode="drop")
    return History(in_prompt, jnp.zeros((B, vocab_size), jnp.int32))


def sample(
    logits: Float32[Array, "B V"],
    params: SamplingParams,
    history: History,
    num_logprobs: int = 0,
    steering: Steering | None = None,
) -> tuple[Sampled, History]:
    """Draws one token a row.

    The draw depends on the row's key and on how many tokens its answer has, not on the other rows or on how steps are dispatched.

    Args:
      logits: the model's scores.
      params: how to sample.
      history: what penalties look at.
      num_logprobs: alternatives K to report (static).
      steering: of some rows; None where no row has any.

    Returns:
      The tokens with their log probabilities, and the history with the tokens counted.
    """
    scores = penalise(logits, params, history)
    scores = scores if steering is None else steer(scores, steering)
    greedy = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    answered = history.counts.sum(axis=-1)

    def draw(_):
        kept = filter_scores(scores / jnp.maximum(params.temperature, 1e-6)[:, None], params)
        keys = jax.vmap(jax.random.fold_in)(params.key, answered)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    random = params.temperature > 0
    drawn = jax.lax.cond(random.any(), draw, lambda _: greedy, None)
    ids = jnp.where(random, drawn, greedy)
    rows = jnp.arange(ids.shape[0])
    history = dataclasses.replace(history, counts=history.counts.at[rows, ids].add(1))
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top_logprobs, top_ids = jax.lax.top_k(logprobs, num_logprobs)
    return Sampled(ids, logprobs[rows, ids], top_ids.astype(jnp.int32), top_logprobs), history


def penalise(logits: Float32[Array, "B V"], params: SamplingParams, history: History) -> Float32[Array, "B V"]:
    """Logits after the three penalties."""
    counts = history.counts.astype(jnp.float32)
    factor = jnp.where(history.in_prompt | (history.counts > 0), params.repetition_penalty[:, None], 1.0)
    scores = jnp.where(logits > 0, logits / factor, logits * factor)
    presence, frequency = params.presence_penalty[:, None], params.frequency_penalty[:, None]
    return scores - presence * jnp.minimum(counts, 1.0) - frequency * counts


def steer(scores: Float32[Array, "B V"], steering: Steering) -> Float32[Array, "B V"]:
    """Scores with the bias added, -inf for what may not come."""
    rows = jnp.arange(scores.shape[0])[:, None]
    scores = scores.at[rows, steering.bias_ids].add(steering.bias, mode="drop")
    ids = jnp.arange(scores.shape[1])
    bits = steering.allowed[:, ids // 32] >> (ids % 32).astype(jnp.uint32)[None]
    return jnp.where((bits & jnp.uint32(1)) == 1, scores, -jnp.inf)


def filter_scores(scores: Float32[Array, "B V"], params: SamplingParams) -> Float32[Array, "B V"]:
    """Scores with -inf where top-k, top-p or min-p rule a token out; the best token always stays.

    Top-p keeps the fewest tokens whose probabilities (after top-k) reach it; tokens that tie with the last one kept stay too.
    """
    best = scores.max(axis=-1)
    with_min_p = best + jnp.log(params.min_p)  # log 0 = -inf keeps all

    def by_rank(_):
        V = scores.shape[-1]
        ranked = -jnp.sort(-scores, axis=-1)
        k = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, V), V)
        inside = jnp.arange(V)[None] < k[:, None]
        probabilities = jax.nn.softmax(jnp.where(inside, ranked, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = inside & ((before < params.top_p[:, None]) | (params.top_p[:, None] >= 1.0))
        count = jnp.maximum(kept.sum(axis=-1), 1)
        return jnp.take_along_axis(ranked, count[:, None] - 1, axis=-1)[:, 0]

    ranks_matter = ((params.top_k > 0) | (params.top_p < 1.0)).any()
    by_rank_threshold = jax.lax.cond(ranks_matter, by_rank, lambda _: jnp.full_like(best, -jnp.inf), None)
    threshold = jnp.minimum(jnp.maximum(with_min_p, by_rank_threshold), best)
    return jnp.where(scores >= threshold[:, None], scores, -jnp.inf)
