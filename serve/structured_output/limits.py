"""Bounds on the format of an answer, checked before llguidance reads it.

llguidance recurses along references, and takes time that is quadratic in some sizes before its own limits
apply. These checks are iterative and linear in the size of the format.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance

from serve.structured_output.spec import GrammarSpec

MAX_SPEC_BYTES = 256 * 1024  # schemas of an answer and of its tool calls, or choices, as UTF-8
MAX_SCHEMA_DEPTH = 100  # llguidance's parser of JSON allows 128, the grammar's own levels included
MAX_SCHEMA_PROPERTIES = 2_000  # of one object; time to compile them is quadratic
MAX_CHOICES = 20_000  # also values of one list in a schema
MAX_REGEX_BYTES = 8 * 1024  # `a*b*` repeated takes quadratic time
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_GRAMMAR_RULES = 2_000

# Bounds of every mask. Each unit of the first three costs time; a state of the lexer costs about 600 bytes.
PARSER_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=1_000,
    step_max_items=20_000,
    step_lexer_fuel=200_000,
    initial_lexer_fuel=1_000_000,
    max_lexer_states=100_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)

_RULE = re.compile(r"(?m)^[ \t]*[?!]?[\w-][\w.-]*[^:\n]*:")


def check_size(spec: GrammarSpec) -> None:
    """Raises ValueError if the format exceeds a bound."""
    if spec.grammar is not None:
        _check("the grammar", _num_bytes(spec.grammar), MAX_GRAMMAR_BYTES, "bytes")
        _check("the grammar", sum(1 for _ in _RULE.finditer(spec.grammar)), MAX_GRAMMAR_RULES, "rules")
    if spec.regex is not None:
        _check("the regular expression", _num_bytes(spec.regex), MAX_REGEX_BYTES, "bytes")
    if spec.choice is not None:
        _check("the choice", len(spec.choice), MAX_CHOICES, "texts")
        _check("the choice", sum(map(_num_bytes, spec.choice)), MAX_SPEC_BYTES, "bytes")
    _check_schemas([spec.schema, *(spec.functions or {}).items()])


def _check_schemas(schemas: list[Any]) -> None:
    """Stops at the first value beyond a bound, however large the rest is."""
    size, level, depth = 0, schemas, 0
    while level:
        _check("the schema", depth, MAX_SCHEMA_DEPTH, "levels")
        inner: list[Any] = []
        for value in level:
            children = _children(value)
            size += 2 * len(children) + (_num_bytes(value) if isinstance(value, str) else 0)
            if size > MAX_SPEC_BYTES:
                raise ValueError(f"the schemas have more than {MAX_SPEC_BYTES} bytes, at most that many are allowed")
            inner.extend(children)
        level, depth = inner, depth + 1


def _children(value: Any) -> Sequence[Any]:
    """Returns the names and values inside an object or a list of a schema, after checking its own size."""
    if isinstance(value, Mapping):
        _check("an object of the schema", len(value), MAX_SCHEMA_PROPERTIES, "properties")
        if isinstance(pattern := value.get("pattern"), str):
            _check("a pattern of the schema", _num_bytes(pattern), MAX_REGEX_BYTES, "bytes")
        return [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        _check("a list of the schema", len(value), MAX_CHOICES, "values")
        return value
    return ()


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


def _check(thing: str, number: int, bound: int, unit: str) -> None:
    if number > bound:
        raise ValueError(f"{thing} has {number} {unit}, at most {bound} are allowed")
