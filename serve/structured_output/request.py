"""The form that a request wants its answer to have, from OpenAI's fields and vLLM's.

Tool calls that are asked for are written as JSON, which a schema describes to the letter.
"""

import dataclasses
from typing import Any

from serve.api.common.errors import ApiError
from serve.api.common.field_names import wrong
from serve.api.common.schema import ChatRequest
from serve.structured_output.grammar import GrammarCompiler, GrammarConstraint, GrammarSpec

_OBJECT = {"type": "object"}
_KINDS = ("json", "json_object", "regex", "choice", "grammar")  # of vLLM's structured_outputs, and of its older guided_*


def compile_constraint(request: ChatRequest, compiler: GrammarCompiler, thinking: bool) -> GrammarConstraint | None:
    """The request's constraint, None for free answers. Raises ApiError that names the field.

    Args:
      request: checked.
      constraints: the model's.
      thinking: whether the prompt ends inside `<think>`.
    """
    said = _said(request)
    if len(said) > 1:
        first, second = list(said)[:2]
        raise ApiError(400, f"{first} and {second} both say what the answer must be; leave one out", second)
    name = next(iter(said), "tool_choice")
    wanted = _with_calls(next(iter(said.values()), None), request)
    if wanted is None:
        return None
    if request.ignore_eos:
        raise ApiError(400, f"ignore_eos is True, but {name} says where the answer ends", "ignore_eos")
    try:
        return compiler.compile(wanted, thinking)
    except ValueError as error:
        raise ApiError(400, f"{name} cannot be kept to: {error}", name) from None


def _said(request: ChatRequest) -> dict[str, GrammarSpec]:
    """What each field that is there asks for."""
    said = {}
    if (form := _response_format(request.response_format)) is not None:
        said["response_format"] = form
    given = request.structured_outputs
    kinds = (
        {}
        if given is None
        else {f"structured_outputs.{kind}": (kind, value) for kind, value in given.items() if value is not None}
    )
    kinds |= {f"guided_{kind}": (kind, getattr(request, f"guided_{kind}")) for kind in _KINDS if kind != "json_object"}
    for path, (kind, value) in kinds.items():
        if value is not None and (form := _structured(kind, value, path)) is not None:
            said[path] = form
    return said


def _response_format(format_: dict[str, Any] | None) -> GrammarSpec | None:
    kind = "text" if format_ is None else format_.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarSpec(schema=_OBJECT)
    if kind != "json_schema":
        raise wrong("response_format.type", kind, "'text', 'json_object' or 'json_schema'")
    told = format_.get("json_schema")
    schema = told.get("schema") if isinstance(told, dict) else None
    if not isinstance(schema, dict):
        raise wrong("response_format.json_schema.schema", schema, "a JSON schema")
    return GrammarSpec(schema=schema)


def _structured(kind: str, value: Any, path: str) -> GrammarSpec | None:
    if kind == "json_object":
        return GrammarSpec(schema=_OBJECT) if value is True else None
    if kind == "json" and isinstance(value, dict):
        return GrammarSpec(schema=value)
    if kind == "choice" and isinstance(value, list) and value and all(isinstance(text, str) and text for text in value):
        return GrammarSpec(choice=tuple(value))
    if kind in ("regex", "grammar") and isinstance(value, str):
        return GrammarSpec(regex=value) if kind == "regex" else GrammarSpec(grammar=value)
    wanted = {"json": "a JSON schema", "choice": "a list of texts", "regex": "a text", "grammar": "a text"}
    if kind not in wanted:
        raise ApiError(400, f"{path} is not served; known are {', '.join(_KINDS)}", path, "unsupported_parameter")
    raise wrong(path, value, wanted[kind])


def _with_calls(answer: GrammarSpec | None, request: ChatRequest) -> GrammarSpec | None:
    """The same with the calls that may, or must, be made."""
    functions = request.functions
    if request.tool_choice == "required":
        return GrammarSpec(functions=functions, parallel=request.parallel_tool_calls)
    if isinstance(request.tool_choice, dict):
        name = request.tool_choice["function"]["name"]
        return GrammarSpec(functions={name: functions[name]}, parallel=False)
    if answer is None or not functions:
        return answer
    if answer.grammar is not None:
        raise ApiError(400, "tools may be called, but a grammar leaves them no room; set tool_choice to 'none'", "tool_choice")
    return dataclasses.replace(answer, functions=functions, parallel=request.parallel_tool_calls)
