"""Options of generation, validated once, before anything runs."""

import dataclasses
import numbers
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt32

from minicpmv46_jax.config import GenerationConfig
from minicpmv46_jax.generation.sampling import MAX_BIASED, MAX_LOGPROBS
from minicpmv46_jax.generation.stop_texts import StopTexts
from minicpmv46_jax.short_repr import short_repr

# OpenAI allows 4 texts. A character of theirs takes 0.25 KB of host memory until its request ends.
MAX_STOP_TEXTS = 256
MAX_STOP_CHARACTERS = 4096  # of all stop texts together
MAX_STOP_TOKEN_IDS = 1024
# A larger temperature draws uniformly too. The reciprocal of one near float32's largest number is flushed to
# zero on the device, and a token that a grammar mask excludes, of score -inf, would have the score NaN.
MAX_TEMPERATURE = 1e6
# A logit times or divided by the penalty, then divided by a temperature of 1e-6, stays finite.
MIN_PENALTY, MAX_PENALTY = 1e-6, 1e6


@typing.runtime_checkable
class Constraint(Protocol):
    """Mask of allowed tokens that depends on the output so far, on the host; one object per output."""

    def mask(self) -> UInt32[np.ndarray, " W"]:
        """Returns the mask of tokens allowed next: bit i % 32 of word i // 32 is token i's."""
        ...

    def advance(self, token: int) -> None:
        """Accepts a sampled token; not called for the output's last token."""
        ...


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """Generation options of one request.

    `generation_options` makes it and takes defaults from generation_config.json.

    Attributes:
      max_new_tokens: maximum number of output tokens; None for the rest of the context.
      temperature: 0 is greedy.
      top_k, top_p, min_p: sampling filters; 0, 1 and 0 switch them off.
      repetition_penalty: over prompt and output; 1 is off (arXiv:1909.05858).
      presence_penalty, frequency_penalty: over the output; 0 is off.
      seed: the same seed, prompt and options give the same output; None draws a random seed.
      stop_token_ids: tokens that end the output and are not part of its text.
      stop: texts that end the output and are not part of it; at most MAX_STOP_TEXTS, of MAX_STOP_CHARACTERS.
      ignore_eos: do not stop at the checkpoint's own end tokens (for load tests).
      logprobs: number of alternatives (0 to 20) to report with each token's log probability, or None.
      logit_bias: (token id, bias); added to the logit after penalties and before temperature.
      constraint: mask of allowed tokens, which limits a dispatch to one token; None for all tokens.
    """

    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop_token_ids: tuple[int, ...]
    stop: StopTexts
    ignore_eos: bool
    logprobs: int | None
    logit_bias: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = None


@typing.no_type_check  # the function checks its arguments itself, with messages for users
def generation_options(
    defaults: GenerationConfig,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
    stop_token_ids: Sequence[int] = (),
    stop: str | Sequence[str] = (),
    ignore_eos: bool = False,
    logprobs: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
    constraint: Constraint | None = None,
) -> GenerationOptions:
    """Validates a request's options and adds the checkpoint's defaults.

    Raises:
      ValueError: an option is out of range; the message has its name, value and range.
    """
    default_temperature = defaults.temperature if defaults.do_sample else 0.0
    _check_stop_token_ids(stop_token_ids)
    own_stops = () if ignore_eos else defaults.stop_token_ids
    return GenerationOptions(
        max_new_tokens=_optional_integer("max_new_tokens", max_new_tokens, 1, None),
        temperature=_number("temperature", default_temperature if temperature is None else temperature, 0.0, MAX_TEMPERATURE),
        top_k=max(_optional_integer("top_k", defaults.top_k if top_k is None else top_k, -1, None), 0),
        top_p=_number("top_p", defaults.top_p if top_p is None else top_p, 0.0, 1.0, above=True),
        min_p=_number("min_p", defaults.min_p if min_p is None else min_p, 0.0, 1.0),
        repetition_penalty=_number(
            "repetition_penalty",
            defaults.repetition_penalty if repetition_penalty is None else repetition_penalty,
            MIN_PENALTY,
            MAX_PENALTY,
        ),
        presence_penalty=_number("presence_penalty", presence_penalty, -2.0, 2.0),
        frequency_penalty=_number("frequency_penalty", frequency_penalty, -2.0, 2.0),
        seed=_optional_integer("seed", seed, -(2**63), 2**63 - 1),
        stop_token_ids=tuple(dict.fromkeys((*own_stops, *stop_token_ids))),
        stop=_stop_texts(stop),
        ignore_eos=bool(ignore_eos),
        logprobs=_optional_integer("logprobs", logprobs, 0, MAX_LOGPROBS),
        logit_bias=_biases(logit_bias or {}),
        constraint=constraint,
    )


def _stop_texts(stop: Sequence[Any]) -> StopTexts:
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(texts) > MAX_STOP_TEXTS:
        raise ValueError(f"stop has {len(texts)} texts, expected at most {MAX_STOP_TEXTS}")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop is {short_repr(stop)}, expected texts of at least one character")
    total = sum(map(len, texts))
    if total > MAX_STOP_CHARACTERS:
        raise ValueError(f"stop has {total} characters in all, expected at most {MAX_STOP_CHARACTERS}")
    return StopTexts(texts)


def _check_stop_token_ids(token_ids: Sequence[Any]) -> None:
    if len(token_ids) > MAX_STOP_TOKEN_IDS:
        raise ValueError(f"stop_token_ids has {len(token_ids)} tokens, expected at most {MAX_STOP_TOKEN_IDS}")
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in token_ids):
        raise ValueError(f"stop_token_ids is {short_repr(token_ids)}, expected token ids")


def _biases(biases: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_BIASED:
        raise ValueError(f"logit_bias has {len(biases)} tokens, at most {MAX_BIASED} may have one")
    for token in biases:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise ValueError(f"logit_bias is for {short_repr(token)}, expected token ids")
    return tuple((token, _number(f"logit_bias[{token}]", bias, -100.0, 100.0)) for token, bias in biases.items())


def _number(name: str, value: object, low: float, high: float, above: bool = False) -> float:
    expected = f"{'above' if above else 'at least'} {low} and at most {high}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{name} is {short_repr(value)}, expected a number {expected}")
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        number = float("inf")
    if not ((number > low if above else number >= low) and number <= high):
        raise ValueError(f"{name} is {number}, expected {expected}")
    return number


def _optional_integer(name: str, value: object, low: int, high: int | None) -> int | None:
    expected = f"an integer of at least {low}" + ("" if high is None else f" and at most {high}")
    if value is None:
        return None
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"{name} is {short_repr(value)}, expected {expected}")
    value = int(value)
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} is {short_repr(value)}, expected {expected}")
    return value
