"""Converts a request's structured-output fields (OpenAI's and vLLM's) to a grammar constraint.

Required tool calls are constrained to the JSON notation, because a schema describes JSON arguments
completely.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

from serve.structured_output.grammar import GrammarCompiler, GrammarConstraint, GrammarSpec

_OBJECT = {"type": "object"}
_KINDS = ("json", "json_object", "regex", "choice", "grammar")  # keys of vLLM's structured_outputs; its older guided_*
_EXPECTED = {"json": "a JSON schema", "choice": "a list of texts", "regex": "a text", "grammar": "a text"}


class StructuredRequest(Protocol):
    """The fields of a checked chat request that decide the format of its answer."""

    response_format: dict[str, Any] | None
    structured_outputs: dict[str, Any] | None
    guided_json: Any
    guided_regex: Any
    guided_choice: Any
    guided_grammar: Any
    tool_choice: Any
    parallel_tool_calls: bool
    ignore_eos: bool

    @property
    def functions(self) -> dict[str, dict[str, Any]]:
        """The functions that may be called: the JSON schema of each one's parameters, by name."""
        ...


class StructuredOutputError(ValueError):
    """A structured-output field that cannot be served. `field` is its path; `code` is OpenAI's error code, if
    any."""

    def __init__(self, message: str, field: str, code: str | None = None):
        super().__init__(message)
        self.field, self.code = field, code


def compile_constraint(request: StructuredRequest, compiler: GrammarCompiler, thinking: bool) -> GrammarConstraint | None:
    """Compiles the request's constraint in this process; returns None for unconstrained answers.

    Args:
      request: a checked request.
      compiler: the model's grammar compiler.
      thinking: True if the prompt ends inside `<think>`.

    Raises:
      StructuredOutputError: a field is invalid or contradicts another.
    """
    field, spec = _requested_spec(request)
    if spec is None:
        return None
    with _errors_of(field):
        return _named(compiler.compile(spec, thinking), field)


async def compile_constraint_bounded(
    request: StructuredRequest, compiler: GrammarCompiler, thinking: bool
) -> GrammarConstraint | None:
    """Does the same as `compile_constraint`, after a trial in a worker process."""
    field, spec = _requested_spec(request)
    if spec is None:
        return None
    with _errors_of(field):
        return _named(await compiler.compile_bounded(spec, thinking), field)


def _requested_spec(request: StructuredRequest) -> tuple[str, GrammarSpec | None]:
    """Returns the path of the field that sets the format, and the format; None for unconstrained answers."""
    specs = _specs_by_field(request)
    if len(specs) > 1:
        first, second = list(specs)[:2]
        raise StructuredOutputError(f"{first} and {second} both set the format of the answer; leave one out", second)
    field = next(iter(specs), "tool_choice")
    spec = _with_tool_calls(next(iter(specs.values()), None), request)
    if spec is not None and request.ignore_eos:
        raise StructuredOutputError(f"ignore_eos is True, but {field} decides where the answer ends", "ignore_eos")
    return field, spec


@contextlib.contextmanager
def _errors_of(field: str) -> Iterator[None]:
    """Attributes the compiler's errors to a field."""
    try:
        yield
    except ValueError as error:
        raise StructuredOutputError(f"{field} cannot be compiled: {error}", field) from None


def _named(constraint: GrammarConstraint, field: str) -> GrammarConstraint:
    constraint.field = field
    return constraint


def _specs_by_field(request: StructuredRequest) -> dict[str, GrammarSpec]:
    """Returns the format that each field requests, by the field's path."""
    specs = {}
    if (spec := _response_format(request.response_format)) is not None:
        specs["response_format"] = spec
    fields = {f"structured_outputs.{kind}": (kind, value) for kind, value in (request.structured_outputs or {}).items()}
    fields |= {f"guided_{kind}": (kind, getattr(request, f"guided_{kind}")) for kind in _KINDS if kind != "json_object"}
    for path, (kind, value) in fields.items():
        if value is not None and (spec := _structured_output(kind, value, path)) is not None:
            specs[path] = spec
    return specs


def _response_format(response_format: dict[str, Any] | None) -> GrammarSpec | None:
    if response_format is None:
        return None
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarSpec(schema=_OBJECT)
    if kind != "json_schema":
        raise _wrong_value("response_format.type", kind, "'text', 'json_object' or 'json_schema'")
    json_schema = response_format.get("json_schema")
    schema = json_schema.get("schema") if isinstance(json_schema, dict) else None
    if not isinstance(schema, dict):
        raise _wrong_value("response_format.json_schema.schema", schema, "a JSON schema")
    return GrammarSpec(schema=schema)


def _structured_output(kind: str, value: Any, path: str) -> GrammarSpec | None:
    if kind == "json_object":
        return GrammarSpec(schema=_OBJECT) if value is True else None
    if kind == "json" and isinstance(value, dict):
        return GrammarSpec(schema=value)
    if kind == "choice" and isinstance(value, list) and value and all(isinstance(text, str) and text for text in value):
        return GrammarSpec(choice=tuple(value))
    if kind in ("regex", "grammar") and isinstance(value, str):
        return GrammarSpec(regex=value) if kind == "regex" else GrammarSpec(grammar=value)
    if kind not in _EXPECTED:
        message = f"{path} is not served; known are {', '.join(_KINDS)}"
        raise StructuredOutputError(message, path, "unsupported_parameter")
    raise _wrong_value(path, value, _EXPECTED[kind])


def _with_tool_calls(spec: GrammarSpec | None, request: StructuredRequest) -> GrammarSpec | None:
    """Returns the format extended by the tool calls that the answer may or must make."""
    functions = request.functions
    if request.tool_choice == "required":
        return GrammarSpec(functions=functions, parallel=request.parallel_tool_calls)
    if isinstance(request.tool_choice, dict):
        name = request.tool_choice["function"]["name"]
        return GrammarSpec(functions={name: functions[name]}, parallel=False)
    if spec is None or not functions:
        return spec
    if spec.grammar is not None:
        message = "a grammar cannot be combined with tool calls; set tool_choice to 'none'"
        raise StructuredOutputError(message, "tool_choice")
    return dataclasses.replace(spec, functions=functions, parallel=request.parallel_tool_calls)


def _wrong_value(path: str, value: Any, expected: str) -> StructuredOutputError:
    shown = repr(value) if not isinstance(value, (dict, list)) else type(value).__name__
    return StructuredOutputError(f"{path} is {shown[:200]}, expected {expected}", path)
