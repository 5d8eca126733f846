"""JSON from requests and from the model's output: finite numbers, whole characters, bounded nesting.

Python's own parser accepts NaN, 1e999 and lone surrogates. They have no JSON text and no tokens, and nesting
near Python's recursion limit fails later, in a template or a schema compiler.
"""

import json
import math
import re
from typing import Any

from minicpmv46_jax.short_repr import shortened

MAX_DEPTH = 200  # levels of arrays and objects; recursive code takes a few calls a level of Python's 1,000
MAX_DIGITS = 308  # of an integer, so that it has a finite float; Python's parser takes quadratic time

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json(text: str, allow_surrogates: bool = False) -> Any:
    """Parses JSON text.

    Args:
      text: the text.
      allow_surrogates: accept texts with half a surrogate pair; see `replace_surrogates`.

    Raises:
      ValueError: the text is not JSON, a number is not finite, nesting is deeper than MAX_DEPTH, or a text
        has half a surrogate pair. The message continues a sentence: "the body is ...".
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if not allow_surrogates and "\\u" in text and _SURROGATE_ESCAPE.search(text):  # `in` is ten times as fast
        _check_characters(value)
    return value


def replace_surrogates(text: str) -> str:
    """Returns the text with U+FFFD for lone surrogates, which UTF-8 cannot encode."""
    return _SURROGATE.sub("\ufffd", text)


_TOO_DEEP = f"nested too deeply: at most {MAX_DEPTH} levels of arrays and objects are read"


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [parent for parent in level if isinstance(parent, (dict, list))]
        if not level:
            return
        level = [child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent)]
    raise ValueError(_TOO_DEEP)


def _check_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        message = "not Unicode text: it has half a character, a \\ud800 to \\udfff escape without its partner"
        raise ValueError(message) from None


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"not valid JSON: the number {shortened(text, 40)} has more than {MAX_DIGITS} digits")
    return int(text)


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"not valid JSON: the number {shortened(text, 40)} is beyond 1.8e308")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"not valid JSON: {name} is not JSON")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=_refuse_constant)
