"""Converts tool arguments from the model's text to the types of the tool's JSON schema.

Text that matches none of the types stays text, so the client still receives it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

# "True" and "None" occur because templates print Python's values.
_WORDS = {"true": True, "false": False, "null": None, "none": None}
MAX_REFERENCES = 8  # a schema may refer to itself in a circle


def convert_argument(text: str, schema: Any, root: Mapping[str, Any]) -> Any:
    """Converts one argument to the first type of its schema that the text matches; else returns the text.

    Args:
      text: the argument as the model wrote it.
      schema: the argument's own schema.
      root: the schema that `$ref`s are resolved in.
    """
    types = list(_types(schema, root, MAX_REFERENCES))
    for type_ in types:
        matches, value = _read(text, type_)
        if matches and (type_ != "null" or "string" not in types or text.strip().lower() == "null"):
            return value
    return text


def _types(schema: Any, root: Mapping[str, Any], references_left: int) -> Iterator[str]:
    """Yields every type that a schema allows, alternatives and references included."""
    if not isinstance(schema, Mapping) or references_left == 0:
        return
    if isinstance(reference := schema.get("$ref"), str):
        yield from _types(_resolve(reference, root), root, references_left - 1)
    types = schema.get("type")
    yield from (types if isinstance(types, list) else [types]) if types else _types_of_values(schema)
    for keyword in ("anyOf", "oneOf", "allOf"):
        for alternative in schema.get(keyword) or () if isinstance(schema.get(keyword), list) else ():
            yield from _types(alternative, root, references_left - 1)


def _types_of_values(schema: Mapping[str, Any]) -> Iterator[str]:
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    names = {bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array", dict: "object"}
    for value in values if isinstance(values, list) else ():
        yield names.get(type(value), "string")


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    at: Any = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        at = at.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(at, Mapping) else None
    return at


def _read(text: str, type_: Any) -> tuple[bool, Any]:
    """Returns (whether the text is of that type, its value)."""
    word = text.strip()
    if type_ in ("boolean", "null"):
        value = _WORDS.get(word.lower(), word)
        return isinstance(value, bool) if type_ == "boolean" else value is None, value
    kinds = {"integer": (int,), "number": (int, float), "array": (list,), "object": (dict,)}.get(type_)
    if kinds is None:
        return False, None
    try:
        value = json.loads(word, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # ValueError: not JSON, or an integer of thousands of digits
        return False, None
    return isinstance(value, kinds) and not isinstance(value, bool), value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
