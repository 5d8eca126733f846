"""Converts tool arguments from the model's text to the types of the tool's JSON schema.

Text that matches none of the types stays text, so the client still receives it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from minicpmv46_jax.strict_json import parse_json

# "True" and "None" occur because templates print Python's values.
_WORDS = {"true": True, "false": False, "null": None, "none": None}


def convert_argument(text: str, schema: Any, root: Mapping[str, Any]) -> Any:
    """Converts one argument to the first type of its schema that the text matches; else returns the text.

    Args:
      text: the argument as the model wrote it.
      schema: the argument's own schema.
      root: the schema that `$ref`s are resolved in.
    """
    types = list(dict.fromkeys(_types(schema, root)))
    for type_ in types:
        matches, value = _read(text, type_)
        if matches and (type_ != "null" or "string" not in types or text.strip().lower() == "null"):
            return value
    return text


def _types(schema: Any, root: Mapping[str, Any]) -> Iterator[str]:
    """Yields every type that a schema allows, references and alternatives included.

    Visits each subschema once, because references may form circles, and many may lead to one subschema.
    """
    pending, seen = [schema], set()
    while pending:
        schema = pending.pop()
        if isinstance(schema, Mapping) and id(schema) not in seen:
            seen.add(id(schema))
            types = schema.get("type") or list(_types_of_values(schema))
            yield from (type_ for type_ in (types if isinstance(types, list) else [types]) if isinstance(type_, str))
            pending += reversed(list(_subschemas(schema, root)))


def _subschemas(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[Any]:
    if isinstance(reference := schema.get("$ref"), str):
        yield _resolve(reference, root)
    for keyword in ("anyOf", "oneOf", "allOf"):
        if isinstance(alternatives := schema.get(keyword), list):
            yield from alternatives


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
        value = parse_json(word, allow_surrogates=True)
    except ValueError:
        return False, None
    return isinstance(value, kinds) and not isinstance(value, bool), value
