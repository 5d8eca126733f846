"""Parses the text inside `<tool_call>`. A call has one of two notations; its first characters decide.

    <function=NAME>                                {"name": "NAME", "arguments": {"KEY": VALUE}}
    <parameter=KEY>
    VALUE
    </parameter>
    </function>

The released template asks for the left one; earlier weights wrote the right one. A call of a function that
the request does not list stays text, because the client could not execute it.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from minicpmv46_jax.strict_json import parse_json, replace_surrogates
from serve.parsers.parts import ToolCall
from serve.parsers.typed import convert_argument

Tools = Mapping[str, Mapping[str, Any]]
"""The functions that may be called: the JSON schema of each one's parameters, by name."""

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*")
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>")
# A value may contain `</parameter>`, so the closing tag must precede a parameter or the function's end.
_PARAMETER_END = re.compile(r"</parameter>\s*(?=<parameter=|</function>)")
_FUNCTION_END = re.compile(r"</function>\s*")


def may_begin_call(text: str) -> bool:
    """Returns whether `text` can be the beginning of a call."""
    text = text.lstrip()
    return text.startswith(("{", "<function=")) or "<function=".startswith(text)


def ends_inside_parameter(text: str) -> bool:
    """Returns whether `text` ends in the middle of a parameter's value."""
    _, tag, value = text.rpartition("<parameter=")
    return bool(tag) and not value.rstrip().endswith("</parameter>") and not _PARAMETER_END.search(value)


def parse_call(text: str, tools: Tools) -> ToolCall | None:
    """Returns the call in `text`, or None if `text` is not a call of one of the tools."""
    parsed = _json_call(text) if text.lstrip().startswith("{") else _xml_call(text)
    if parsed is None or parsed[0] not in tools:
        return None
    name, arguments = parsed
    return ToolCall(name, _encode(_convert_arguments(arguments, tools[name])))


def _json_call(text: str) -> tuple[str, dict[str, Any]] | None:
    try:
        call = parse_json(text, allow_surrogates=True)
        arguments = call.get("arguments", {})
        arguments = parse_json(arguments, allow_surrogates=True) if isinstance(arguments, str) else arguments
    except ValueError:
        return None
    if not isinstance(call.get("name"), str) or not isinstance(arguments, dict) or call.keys() - {"name", "arguments", "id"}:
        return None
    return call["name"], arguments


def _xml_call(text: str) -> tuple[str, dict[str, Any]] | None:
    function = _FUNCTION.match(text)
    if function is None:
        return None
    arguments, at = {}, function.end()
    while parameter := _PARAMETER.match(text, at):
        end = _PARAMETER_END.search(text, parameter.end())
        if end is None or parameter[1].strip() in arguments:
            return None
        value = text[parameter.end() : end.start()]
        arguments[parameter[1].strip()] = value.removeprefix("\n").removesuffix("\n")
        at = end.end()
    return (function[1].strip(), arguments) if _FUNCTION_END.fullmatch(text, at) else None


def _convert_arguments(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    return {
        key: convert_argument(value, properties.get(key), schema) if isinstance(value, str) else value
        for key, value in arguments.items()
    }


def _encode(arguments: dict[str, Any]) -> str:
    return replace_surrogates(json.dumps(arguments, ensure_ascii=False, allow_nan=False))
