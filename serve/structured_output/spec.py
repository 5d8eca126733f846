"""The format of an answer, converted to a grammar of llguidance."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

# White space between the parts of a document: enough to lay it out, too little to fill an answer with.
_LAYOUT = {"whitespace_pattern": r"[ \n\t]{0,20}"}

# A line that only Lark's notation has. llguidance's own test takes quadratic time on empty lines.
_LARK_LINE = re.compile(r"(?m)^[ \t]*(?:%llguidance\b|start[ \t]*:(?!:=))")


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
            return llguidance.LLMatcher.grammar_from_lark(_to_lark(self.grammar))
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
        if self.choice is not None:  # a terminal is one automaton; alternatives of a rule are items of every row
            return f"answer: CHOICE\nCHOICE: {' | '.join(map(_text, self.choice))}"
        return None


def _to_lark(grammar: str) -> str:
    if _LARK_LINE.search(grammar):
        return grammar
    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # it raises Exception itself, and RecursionError for deep nesting
        raise ValueError(f"the GBNF notation is not understood: {error}") from None


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
