"""What stands inside `<tool_call>`: either of two ways to write a call, told apart by what the model writes.

    <function=NAME>                                {"name": "NAME", "arguments": {"KEY": VALUE}}
    <parameter=KEY>
    VALUE
    </parameter>
    </function>

The left one is what the released template asks for, the right one what earlier weights wrote. A function that was not offered is
no call: the client would not know what to do with it.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from serve.parsers.parts import ToolCall
from serve.parsers.typed import typed

Tools = Mapping[str, Mapping[str, Any]]
"""The functions on offer: the JSON schema of each one's parameters, by name."""

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*")
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>")
# A value may itself contain `</parameter>`: the one that counts is followed by something that may follow.
_PARAMETER_END = re.compile(r"</parameter>\s*(?=<parameter=|</function>)")
_FUNCTION_END = re.compile(r"</function>\s*")


def may_begin(inner: str) -> bool:
    """Whether this may be the beginning of a call."""
    begun = inner.lstrip()
    return begun.startswith(("{", "<function=")) or "<function=".startswith(begun)


def parameter_is_open(inner: str) -> bool:
    """Whether this ends in the middle of a parameter's value."""
    _, begun, value = inner.rpartition("<parameter=")
    return bool(begun) and not value.rstrip().endswith("</parameter>") and not _PARAMETER_END.search(value)


def parse(inner: str, tools: Tools) -> ToolCall | None:
    """The call written there, None if it is none."""
    found = _json_call(inner) if inner.lstrip().startswith("{") else _xml_call(inner)
    if found is None or found[0] not in tools:
        return None
    name, arguments = found
    return ToolCall(name, _encode(_typed_all(arguments, tools[name])))


def _json_call(inner: str) -> tuple[str, dict[str, Any]] | None:
    try:
        call = json.loads(inner, parse_constant=_no_constant)
        arguments = call.get("arguments", {})
        arguments = json.loads(arguments, parse_constant=_no_constant) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return None
    if not isinstance(call.get("name"), str) or not isinstance(arguments, dict) or call.keys() - {"name", "arguments", "id"}:
        return None
    return call["name"], arguments


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _xml_call(inner: str) -> tuple[str, dict[str, Any]] | None:
    head = _FUNCTION.match(inner)
    if head is None:
        return None
    arguments, at = {}, head.end()
    while parameter := _PARAMETER.match(inner, at):
        end = _PARAMETER_END.search(inner, parameter.end())
        if end is None or parameter[1].strip() in arguments:
            return None
        value = inner[parameter.end() : end.start()]
        arguments[parameter[1].strip()] = value.removeprefix("\n").removesuffix("\n")
        at = end.end()
    return (head[1].strip(), arguments) if _FUNCTION_END.fullmatch(inner, at) else None


def _typed_all(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    return {
        key: typed(value, properties.get(key), schema) if isinstance(value, str) else value for key, value in arguments.items()
    }


def _encode(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)
