"""Structured output: answers that follow a JSON schema, a regular expression, a choice, a grammar or a tool's schema.

A `GrammarConstraint` belongs to one answer and lives on the host. `mask` returns the grammar mask, the tokens that may come
next as bits. `advance` takes the token that was sampled. llguidance computes masks without holding Python's lock, so the
masks of a batch are computed in parallel while the device runs. Reasoning tokens are not constrained.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import llguidance
import numpy as np
from jaxtyping import UInt32

from minicpmv46_jax.generation.detokenize import Detokenizer
from serve.parsers.reasoning import ReasoningParser

# White space that a document may have between its parts: enough to lay it out, too little to fill an answer with.
_LAYOUT = {"whitespace_pattern": r"[ \n\t]{0,20}"}


@dataclasses.dataclass(frozen=True)
class GrammarSpec:
    """What an answer must be. One of the first five, or none; or calls, or either.

    Attributes:
      schema: a document of this JSON schema.
      regex: text that the expression matches.
      choice: one of these texts.
      grammar: text of this grammar, in Lark's or in GBNF's notation.
      functions: a call of one of these: the schemas of their parameters by name. Beside one of the above: that or a call.
      parallel: whether there may be several calls.
    """

    schema: Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    functions: Mapping[str, Mapping[str, Any]] | None = None
    parallel: bool = True

    def llguidance(self) -> str:
        """As a grammar of llguidance's. Raises ValueError."""
        if self.grammar is not None:
            return llguidance.grammar_from("grammar", self.grammar)
        answer = self._answer()
        if self.functions is None:
            return llguidance.LLMatcher.grammar_from_lark(f"start: answer\n{answer}")
        start = "start: calls" if answer is None else f"start: answer | calls\n{answer}"
        return llguidance.LLMatcher.grammar_from_lark(f"{start}\n{_calls(self.functions, self.parallel)}")

    def _answer(self) -> str | None:
        if self.schema is not None:
            return f"answer: {_json(self.schema)}"
        if self.regex is not None:
            return f"answer: REGEX\nREGEX: /{llguidance.regex_to_lark(self.regex)}/"
        if self.choice is not None:
            return f"answer: {' | '.join(map(_text, self.choice))}"
        return None


def _calls(functions: Mapping[str, Mapping[str, Any]], parallel: bool) -> str:
    """Calls in the JSON notation, whose arguments a schema describes to the letter."""
    rules = [
        f"call_{i}: {_head(name)} {_json(schema or {'type': 'object'})} {_text('}')}"
        for i, (name, schema) in enumerate(functions.items())
    ]
    one_of = " | ".join(f"call_{i}" for i in range(len(functions)))
    more = f" ({_text(chr(10))} call)*" if parallel else ""
    marked = f"call: {_text('<tool_call>' + chr(10))} body {_text(chr(10) + '</tool_call>')}"
    return "\n".join([f"calls: call{more}", marked, f"body: {one_of}", *rules])


def _head(name: str) -> str:
    return _text(f'{{"name": {json.dumps(name)}, "arguments": ')


def _json(schema: Mapping[str, Any] | bool) -> str:
    schema = dict(schema) if isinstance(schema, Mapping) else {"allOf": [schema]}
    return f"%json {json.dumps({**schema, 'x-guidance': _LAYOUT})}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class GrammarCompiler:
    """Makes constraints for one model's answers.

    Args:
      detokenizer: the model's.
      tokenize: from text to token ids.
      vocabulary: how many tokens there are.
      stops: tokens that end an answer; the first stands for them all where llguidance asks for one.
    """

    def __init__(self, detokenizer: Detokenizer, tokenize: Callable[[str], list[int]], vocabulary: int, stops: tuple[int, ...]):
        self._detokenizer, self._tokenize, self._size, self._stops = detokenizer, tokenize, vocabulary, stops

    def compile(self, wanted: GrammarSpec, thinking: bool) -> "Constraint":
        """A constraint for one answer.

        Args:
          wanted: what it must be.
          thinking: whether the prompt ends inside `<think>`.

        Raises:
          ValueError: what is wrong with the schema, expression or grammar, in one line.
        """
        grammar = wanted.llguidance()
        if mistake := llguidance.LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise ValueError(_first_line(mistake))
        constraint = GrammarConstraint(self._tokenizer, grammar, self._detokenizer, thinking)
        if constraint.broken:
            raise ValueError(constraint.broken)
        return constraint

    @functools.cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance wants it, made when first needed."""
        special = self._detokenizer.special | set(self._stops)
        # One that is no text has bytes that UTF-8 never has, lest it be taken for its name.
        tokens = [b"\xff" + str(i).encode() if i in special else self._detokenizer.token_bytes(i) for i in range(self._size)]
        vocabulary = _Vocabulary(tokens, sorted(special), self._stops[0], self._tokenize)
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), eos_token=list(self._stops))


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    tokenize: Callable[[str], list[int]]
    bos_token_id: None = None

    def __call__(self, text: str) -> list[int]:
        return self.tokenize(text)


class GrammarConstraint:
    """One answer's. Not to be shared between threads at once; `copy_from_start` gives another for another answer."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, grammar: str, detokenizer: Detokenizer, thinking: bool):
        self._tokenizer, self._grammar, self._detokenizer = tokenizer, grammar, detokenizer
        self._thinking = thinking
        self._reasoning = ReasoningParser(thinking)
        self._matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        self._free = np.full(-(-tokenizer.vocab_size // 32), 0xFFFFFFFF, np.uint32)

    def mask(self) -> UInt32[np.ndarray, " W"]:
        """Which tokens may come next: bit i % 32 of word i // 32 is token i's. Raises RuntimeError if the parser gave up."""
        if self._reasoning.thinking:
            return self._free
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self.broken:
            raise RuntimeError(f"the constraint cannot be kept: {self.broken}")
        return mask

    def advance(self, token: int) -> None:
        """The token that came. Raises RuntimeError for one that the mask had ruled out."""
        if self._reasoning.thinking:
            self._reasoning.push(self._detokenizer.token_bytes(token).decode("utf-8", "replace"))
        elif not self._matcher.consume_token(token):
            raise RuntimeError(f"token {token} breaks the constraint: {_first_line(self._matcher.get_error())}")

    @property
    def broken(self) -> str:
        """Why the parser gave up; "" while it has not."""
        return _first_line(self._matcher.get_error())

    def copy_from_start(self, thinking: bool | None = None) -> "Constraint":
        """The same for another answer, from its beginning; or for one whose thinking was ended."""
        return GrammarConstraint(
            self._tokenizer, self._grammar, self._detokenizer, self._thinking if thinking is None else thinking
        )


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0].removesuffix(":")
