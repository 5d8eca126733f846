"""Tool arguments from the text that a model writes to the types that the tool's JSON schema asks for.

Text that does not fit stays text: the caller then sees what the model wrote.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

_WORDS = {"true": True, "false": False, "null": None, "none": None}  # "True" and "None": what templates make of Python's values
MAX_REFERENCES = 8  # a schema may refer to itself in a circle


def typed(text: str, schema: Any, root: Mapping[str, Any]) -> Any:
    """One argument.

    Args:
      text: as the model wrote it.
      schema: the argument's own.
      root: the schema that `$ref`s in it start from.
    """
    wanted = list(_types(schema, root, MAX_REFERENCES))
    for type_ in wanted:
        found, value = _read(text, type_)
        if found and (type_ != "null" or "string" not in wanted or text.strip().lower() == "null"):
            return value
    return text


def _types(schema: Any, root: Mapping[str, Any], left: int) -> Iterator[str]:
    """Every type that a schema allows, through its alternatives."""
    if not isinstance(schema, Mapping) or left == 0:
        return
    if isinstance(reference := schema.get("$ref"), str):
        yield from _types(_resolve(reference, root), root, left - 1)
    own = schema.get("type")
    yield from (own if isinstance(own, list) else [own]) if own else _types_of_values(schema)
    for word in ("anyOf", "oneOf", "allOf"):
        for alternative in schema.get(word) or () if isinstance(schema.get(word), list) else ():
            yield from _types(alternative, root, left - 1)


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
    """(whether the text is of that type, its value)."""
    word = text.strip()
    if type_ in ("boolean", "null"):
        value = _WORDS.get(word.lower(), word)
        return isinstance(value, bool) if type_ == "boolean" else value is None, value
    kinds = {"integer": (int,), "number": (int, float), "array": (list,), "object": (dict,)}.get(type_)
    if kinds is None:
        return False, None
    try:
        value = json.loads(word, parse_constant=_no_constant)
    except (ValueError, RecursionError):  # ValueError: not JSON, or an integer of thousands of digits
        return False, None
    return isinstance(value, kinds) and not isinstance(value, bool), value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
