"""Trials of grammars in a worker process, before the server itself compiles them.

llguidance may overflow the stack, take minutes or gigabytes, or give up while an answer is generated. A trial
compiles the grammar and follows random tokens. It costs at most a worker process.
"""

import random

import llguidance
import numpy as np

from serve.runtime.worker_pool import Call, WorkerCrashed, WorkerPool
from serve.structured_output.large_stack import run_on_large_stack
from serve.structured_output.limits import PARSER_LIMITS
from serve.structured_output.spec import GrammarSpec
from serve.structured_output.vocabulary import Vocabulary

TRIAL_CPU_S = 2.0  # processor time of one trial
TRIAL_ELAPSED_S = 30.0
TRIAL_MEMORY_BYTES = 256 * 2**20  # of one trial, beyond the vocabulary
TRIAL_ANSWERS, TRIAL_TOKENS = 3, 30  # most grammars that llguidance gives up fail within these answers' tokens
TRIAL_WORKERS = 2  # so that one slow trial does not delay every other request

_tokenizer: llguidance.LLTokenizer | None = None  # of a worker process


def start_trial_workers(vocabulary: Vocabulary) -> WorkerPool:
    """Starts the worker processes of a vocabulary, which are ready some seconds later. Close the pool."""
    return WorkerPool(TRIAL_WORKERS, "grammar-trial", TRIAL_MEMORY_BYTES, _start_worker, vocabulary)


def _start_worker(vocabulary: Vocabulary) -> None:
    global _tokenizer
    _tokenizer = vocabulary.tokenizer()
    run_on_large_stack(int).result()  # starts the thread, whose stack would count as the trial's memory


def run_trial(call: Call, spec: GrammarSpec) -> str:
    """Tries a format in a worker process and returns it as a grammar of llguidance.

    Raises:
      ValueError: the format is invalid, or llguidance gives it up.
      WorkerFailed: the trial exceeded a bound, or crashed twice.
    """
    try:
        return call(_try_spec, spec, cpu_s=TRIAL_CPU_S, timeout_s=TRIAL_ELAPSED_S)
    except WorkerCrashed:  # another process may have ended it
        return call(_try_spec, spec, cpu_s=TRIAL_CPU_S, timeout_s=TRIAL_ELAPSED_S)


def _try_spec(spec: GrammarSpec) -> str:
    grammar, matcher = run_on_large_stack(_compile, spec).result()
    for seed in range(TRIAL_ANSWERS):  # on a stack as small as those of the server's threads
        _follow_random_tokens(matcher.deep_copy(), seed)
    return grammar


def _compile(spec: GrammarSpec) -> tuple[str, llguidance.LLMatcher]:
    assert _tokenizer is not None
    grammar = spec.to_llguidance()
    return grammar, new_matcher(_tokenizer, grammar)


def new_matcher(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """Returns the matcher of a grammar. Raises ValueError, in one line, if the grammar is invalid."""
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=PARSER_LIMITS)
    if matcher.is_error():
        raise ValueError(first_line(matcher.get_error()))
    return matcher


def first_line(message: str) -> str:
    """Returns the first line of an error of llguidance."""
    return message.strip().partition("\n")[0].removesuffix(":")


def _follow_random_tokens(matcher: llguidance.LLMatcher, seed: int) -> None:
    """Raises ValueError if the matcher fails within TRIAL_TOKENS tokens; forced tokens are not counted."""
    assert _tokenizer is not None
    draw = random.Random(seed)
    for _ in range(TRIAL_TOKENS):
        matcher.consume_tokens(matcher.compute_ff_tokens())
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(mask, count=_tokenizer.vocab_size, bitorder="little")
        bits[_tokenizer.eos_tokens] = 0
        allowed = np.flatnonzero(bits)
        if len(allowed) and not matcher.is_error():
            matcher.consume_token(int(draw.choice(allowed)))
        if matcher.is_error():
            raise ValueError(f"it cannot be followed: {first_line(matcher.get_error())}")
        if not len(allowed):
            return
