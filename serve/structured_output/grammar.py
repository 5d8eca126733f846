"""Structured output: answers that follow a JSON schema, a regular expression, a choice, a grammar or a tool's
schema.

A `GrammarConstraint` belongs to one answer and lives on the host. `mask` returns the grammar mask: the tokens
that may come next, as bits. `advance` takes the token that was sampled. llguidance computes masks without
Python's lock, so the masks of a batch are computed in parallel while the device runs. Reasoning tokens are
not constrained.
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
from serve.structured_output.vocabulary import Vocabulary

# White space between the parts of a document: enough to lay it out, too little to fill an answer with.
_LAYOUT = {"whitespace_pattern": r"[ \n\t]{0,20}"}


@dataclasses.dataclass(frozen=True)
class GrammarSpec:
    """The format of an answer: at most one of the first four fields, or tool calls, or either.

    Attributes:
      schema: the answer is a document of this JSON schema.
      regex: the answer matches this regular expression.
      choice: the answer is one of these texts.
      grammar: the answer follows this grammar, in Lark's or GBNF's notation.
      functions: the answer calls these functions: the JSON schema of each one's parameters, by name. If one
        of `schema`, `regex` and `choice` is set too, the answer is either that or calls.
      parallel: True if several calls may come.
    """

    schema: Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    functions: Mapping[str, Mapping[str, Any]] | None = None
    parallel: bool = True

    def to_llguidance(self) -> str:
        """Returns the format as a grammar of llguidance. Raises ValueError if it has none."""
        if self.grammar is not None:
            return llguidance.grammar_from("grammar", self.grammar)
        answer = self._answer_rule()
        if self.functions is None:
            return llguidance.LLMatcher.grammar_from_lark(f"start: answer\n{answer}")
        start = "start: calls" if answer is None else f"start: answer | calls\n{answer}"
        return llguidance.LLMatcher.grammar_from_lark(f"{start}\n{_call_rules(self.functions, self.parallel)}")

    def _answer_rule(self) -> str | None:
        if self.schema is not None:
            return f"answer: {_json(self.schema)}"
        if self.regex is not None:
            return f"answer: REGEX\nREGEX: /{llguidance.regex_to_lark(self.regex)}/"
        if self.choice is not None:
            return f"answer: {' | '.join(map(_text, self.choice))}"
        return None


def _call_rules(functions: Mapping[str, Mapping[str, Any]], parallel: bool) -> str:
    """Returns the rules of calls in the JSON notation, because a schema describes JSON arguments
    completely."""
    rules = [
        f"call_{i}: {_call_head(name)} {_json(schema or {'type': 'object'})} {_text('}')}"
        for i, (name, schema) in enumerate(functions.items())
    ]
    one_of = " | ".join(f"call_{i}" for i in range(len(functions)))
    more = f" ({_text(chr(10))} call)*" if parallel else ""
    tagged = f"call: {_text('<tool_call>' + chr(10))} body {_text(chr(10) + '</tool_call>')}"
    return "\n".join([f"calls: call{more}", tagged, f"body: {one_of}", *rules])


def _call_head(name: str) -> str:
    return _text(f'{{"name": {json.dumps(name)}, "arguments": ')


def _json(schema: Mapping[str, Any] | bool) -> str:
    schema = dict(schema) if isinstance(schema, Mapping) else {"allOf": [schema]}
    return f"%json {json.dumps({**schema, 'x-guidance': _LAYOUT})}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class GrammarCompiler:
    """A compiler of grammars for one model's vocabulary.

    Args:
      detokenizer: the model's detokenizer.
      tokenize: converts text to token ids.
      vocab_size: number of tokens.
      stop_token_ids: tokens that end an answer. llguidance takes the first as its end-of-sequence token.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        tokenize: Callable[[str], list[int]],
        vocab_size: int,
        stop_token_ids: tuple[int, ...],
    ):
        self._detokenizer, self._tokenize = detokenizer, tokenize
        self._vocab_size, self._stop_token_ids = vocab_size, stop_token_ids

    def compile(self, spec: GrammarSpec, thinking: bool) -> "GrammarConstraint":
        """Compiles the constraint of one answer.

        Args:
          spec: the format of the answer.
          thinking: True if the prompt ends inside `<think>`.

        Raises:
          ValueError: the schema, expression or grammar is invalid; the message is one line.
        """
        grammar = spec.to_llguidance()
        if error := llguidance.LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise ValueError(_first_line(error))
        constraint = GrammarConstraint(self._tokenizer, grammar, self._detokenizer, thinking)
        if constraint.error:
            raise ValueError(constraint.error)
        return constraint

    @functools.cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance's tokenizer, built on first use."""
        vocabulary = Vocabulary.of(self._detokenizer, self._vocab_size, self._stop_token_ids)
        return vocabulary.tokenizer(self._tokenize)


class GrammarConstraint:
    """The grammar state of one answer; see `options.Constraint`. Not safe for concurrent use by several
    threads."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, grammar: str, detokenizer: Detokenizer, thinking: bool):
        self._tokenizer, self._grammar, self._detokenizer = tokenizer, grammar, detokenizer
        self._thinking = thinking
        self._reasoning = ReasoningParser(thinking)
        self._matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        self._all_tokens = np.full(-(-tokenizer.vocab_size // 32), 0xFFFFFFFF, np.uint32)

    def mask(self) -> UInt32[np.ndarray, " W"]:
        """Returns the tokens that may come next: bit i % 32 of word i // 32 is token i's.

        Raises:
          RuntimeError: the matcher has failed.
        """
        if self._reasoning.thinking:
            return self._all_tokens
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self.error:
            raise RuntimeError(f"the grammar cannot be followed: {self.error}")
        return mask

    def advance(self, token: int) -> None:
        """Advances by a sampled token. Raises RuntimeError if the mask does not allow it."""
        if self._reasoning.thinking:
            self._reasoning.push(self._detokenizer.token_bytes(token).decode("utf-8", "replace"))
        elif not self._matcher.consume_token(token):
            raise RuntimeError(f"token {token} breaks the grammar: {_first_line(self._matcher.get_error())}")

    @property
    def error(self) -> str:
        """The reason why the matcher has failed; "" if it has not."""
        return _first_line(self._matcher.get_error())

    def copy_from_start(self, thinking: bool | None = None) -> "GrammarConstraint":
        """Returns the same constraint at its start, for another answer.

        Args:
          thinking: True if that answer starts inside `<think>`; None for the same as this one.
        """
        thinking = self._thinking if thinking is None else thinking
        return GrammarConstraint(self._tokenizer, self._grammar, self._detokenizer, thinking)


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0].removesuffix(":")
