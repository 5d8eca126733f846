"""Structured output: answers that follow a JSON schema, a regular expression, a choice, a grammar or a tool's
schema.

A `GrammarConstraint` belongs to one answer and lives on the host. `mask` returns the grammar mask: the tokens
that may come next, as bits. `advance` takes the token that was sampled. llguidance computes masks without
Python's lock, so the masks of a batch are computed in parallel while the device runs. Reasoning tokens are
not constrained.
"""

import asyncio
import collections
import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import llguidance
import numpy as np
from jaxtyping import UInt32

from minicpmv46_jax.generation.detokenize import Detokenizer
from serve.parsers.reasoning import ReasoningParser
from serve.runtime.worker_pool import Call, WorkerFailed, WorkerPool
from serve.structured_output.large_stack import run_on_large_stack
from serve.structured_output.limits import check_size
from serve.structured_output.spec import GrammarSpec
from serve.structured_output.trial import first_line, new_matcher, run_trial
from serve.structured_output.vocabulary import Vocabulary

MASK_CPU_S = 2.0  # processor time that an answer's masks may take beyond MASK_CPU_S_PER_TOKEN
MASK_CPU_S_PER_TOKEN = 0.02  # ordinary schemas take about a millisecond
KEPT_VERDICTS = 128
_TOKEN_REFUSED = "satisfy the grammar"  # in llguidance's error about a token outside the mask
T = TypeVar("T")


class ConstraintFailed(ValueError):
    """A grammar that llguidance has given up during an answer, or whose masks take too long.

    Attributes:
      field: the path of the request's field that set the format, if known.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


class GrammarCompiler:
    """A compiler of grammars for one model's vocabulary.

    Args:
      detokenizer: the model's detokenizer.
      tokenize: converts text to token ids.
      vocab_size: number of tokens.
      stop_token_ids: tokens that end an answer. llguidance takes the first as its end-of-sequence token.
      workers: the processes of `compile_bounded`, from `start_trial_workers`; None for no trials.
      run_check: runs a function that holds Python's lock for milliseconds.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        tokenize: Callable[[str], list[int]],
        vocab_size: int,
        stop_token_ids: tuple[int, ...],
        workers: WorkerPool | None = None,
        run_check: Callable[..., Awaitable[Any]] = asyncio.to_thread,
    ):
        self._detokenizer, self._tokenize = detokenizer, tokenize
        self._vocab_size, self._stop_token_ids = vocab_size, stop_token_ids
        self._workers, self._verdicts, self._run_check = workers, _Verdicts(), run_check
        self._building = threading.Lock()
        self._built: llguidance.LLTokenizer | None = None

    def warm_up(self) -> None:
        """Builds the vocabulary's tokenizer, which takes seconds; else the first compilation does."""
        with self._building:
            if self._built is None:
                vocabulary = Vocabulary.of(self._detokenizer, self._vocab_size, self._stop_token_ids)
                self._built = vocabulary.tokenizer(self._tokenize)

    def compile(self, spec: GrammarSpec, thinking: bool) -> "GrammarConstraint":
        """Compiles the constraint of one answer in this process, without a trial.

        Args:
          spec: the format of the answer.
          thinking: True if the prompt ends inside `<think>`.

        Raises:
          ValueError: the schema, expression or grammar is invalid or too large; the message is one line.
        """
        check_size(spec)
        return run_on_large_stack(lambda: self._compile(spec.to_llguidance(), thinking)).result()

    async def compile_bounded(self, spec: GrammarSpec, thinking: bool) -> "GrammarConstraint":
        """Compiles the constraint of one answer after a trial in a worker process.

        Takes and raises the same as `compile`; also raises ValueError if the trial exceeds a bound.
        """
        key = await self._run_check(_checked_key, spec)
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = await self._try(key, spec)
        if verdict.error:
            raise ValueError(verdict.error)
        return await asyncio.wrap_future(run_on_large_stack(self._compile, verdict.grammar, thinking))

    async def _try(self, key: bytes, spec: GrammarSpec) -> "_Verdict":
        if self._workers is None:
            return _Verdict(await asyncio.wrap_future(run_on_large_stack(spec.to_llguidance)))
        return await self._workers.run(lambda call: self._run_trial(call, key, spec))

    def _run_trial(self, call: Call, key: bytes, spec: GrammarSpec) -> "_Verdict":
        if (verdict := self._verdicts.get(key)) is not None:  # from a request that waited before this one
            return verdict
        try:
            verdict = _Verdict(run_trial(call, spec))
        except (ValueError, MemoryError, WorkerFailed) as error:
            verdict = _Verdict(error=_reason(error))
        self._verdicts.put(key, verdict)
        return verdict

    def _compile(self, grammar: str, thinking: bool) -> "GrammarConstraint":
        self.warm_up()
        assert self._built is not None
        all_tokens = np.full(-(-self._vocab_size // 32), 0xFFFFFFFF, np.uint32)
        return GrammarConstraint(new_matcher(self._built, grammar), all_tokens, self._detokenizer, thinking)


@dataclasses.dataclass(frozen=True)
class _Verdict:
    """The result of a trial: the format as a grammar of llguidance, or the reason why it is refused."""

    grammar: str = ""
    error: str = ""


class _Verdicts:
    """The last KEPT_VERDICTS results of trials."""

    def __init__(self):
        self._verdicts: collections.OrderedDict[bytes, _Verdict] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> _Verdict | None:
        with self._lock:
            if key in self._verdicts:
                self._verdicts.move_to_end(key)
            return self._verdicts.get(key)

    def put(self, key: bytes, verdict: _Verdict) -> None:
        with self._lock:
            self._verdicts[key] = verdict
            if len(self._verdicts) > KEPT_VERDICTS:
                self._verdicts.popitem(last=False)


def _checked_key(spec: GrammarSpec) -> bytes:
    check_size(spec)
    fields = [getattr(spec, field.name) for field in dataclasses.fields(spec)]
    return hashlib.sha256(json.dumps(fields).encode()).digest()


def _reason(error: Exception) -> str:
    if isinstance(error, WorkerFailed):
        return f"its trial {error}"
    return "its trial takes too much memory" if isinstance(error, MemoryError) else str(error)


class GrammarConstraint:
    """The grammar state of one answer; see `options.Constraint`. Not safe for concurrent use by several
    threads.

    Attributes:
      field: the path of the request's field that set the format, for errors.

    Args:
      matcher: the grammar's matcher at its start; it stays there.
      all_tokens: the mask of all tokens.
      detokenizer: the model's detokenizer.
      thinking: True if the answer starts inside `<think>`.
      field: see above.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        all_tokens: UInt32[np.ndarray, " W"],
        detokenizer: Detokenizer,
        thinking: bool,
        field: str | None = None,
    ):
        self._start, self._matcher = matcher, matcher.deep_copy()
        self._all_tokens, self._detokenizer, self._thinking, self.field = all_tokens, detokenizer, thinking, field
        self._reasoning = ReasoningParser(thinking)
        self._cpu_left_s = MASK_CPU_S

    def mask(self) -> UInt32[np.ndarray, " W"]:
        """Returns the tokens that may come next: bit i % 32 of word i // 32 is token i's.

        Raises:
          ConstraintFailed: the matcher has failed.
          RuntimeError: `advance` has raised it.
        """
        if self._reasoning.thinking:
            return self._all_tokens
        mask = np.frombuffer(self._timed(self._matcher.compute_bitmask), np.uint32)
        if error := self.error:
            raise self._failure(error)
        return mask

    def advance(self, token: int) -> None:
        """Advances by a sampled token.

        Raises:
          ConstraintFailed: the matcher has failed, or its masks have taken too long.
          RuntimeError: the mask does not allow the token.
        """
        if self._reasoning.thinking:
            self._reasoning.push(self._detokenizer.token_bytes(token).decode("utf-8", "replace"))
            return
        if not self._timed(self._matcher.consume_token, token):
            raise self._failure(self.error, f"token {token} breaks the grammar")
        self._cpu_left_s += MASK_CPU_S_PER_TOKEN
        if self._cpu_left_s < 0:
            raise self._failure(f"its masks take more than {MASK_CPU_S_PER_TOKEN:g} seconds of processor time a token")

    def _timed(self, function: Callable[..., T], *args) -> T:
        begun = time.thread_time()
        try:
            return function(*args)
        finally:
            self._cpu_left_s -= time.thread_time() - begun

    def _failure(self, reason: str, if_refused: str = "the grammar cannot be followed") -> Exception:
        if _TOKEN_REFUSED in reason:  # a fault of the server: sampling has ignored the mask
            return RuntimeError(f"{if_refused}: {reason}")
        return ConstraintFailed(f"the grammar cannot be followed: {reason}", self.field)

    @property
    def error(self) -> str:
        """The reason why the matcher has failed; "" if it has not."""
        return first_line(self._matcher.get_error())

    def copy_from_start(self, thinking: bool | None = None) -> "GrammarConstraint":
        """Returns the same constraint at its start, for another answer. The copies share the lexer's states.

        Args:
          thinking: True if that answer starts inside `<think>`; None for the same as this one.
        """
        thinking = self._thinking if thinking is None else thinking
        return GrammarConstraint(self._start, self._all_tokens, self._detokenizer, thinking, self.field)
