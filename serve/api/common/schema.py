"""The fields of requests, and their checks.

A field that would change the answer and is not served is refused by name, never ignored. A null field counts
as absent.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from minicpmv46_jax.generation.sampling import MAX_BIASED, MAX_LOGPROBS
from minicpmv46_jax.short_repr import short_repr, shortened
from minicpmv46_jax.strict_json import parse_json
from serve.api.common.errors import ApiError
from serve.api.common.field_names import MAX_ENTRIES

# Bookkeeping fields of OpenAI's and vLLM's clients, which no answer depends on.
IGNORED_FIELDS = frozenset("user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention".split())

# Fields of OpenAI and vLLM that are served with one value only.
SINGLE_VALUE_FIELDS: dict[str, Any] = {
    "best_of": 1,
    "modalities": ["text"],
    "echo": False,
    "use_beam_search": False,
    "min_tokens": 0,
    "add_special_tokens": False,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
}

# Counted before parsing: an empty object of two bytes takes 72 in memory and a third of a microsecond.
MAX_CONTAINERS = 2**16
MAX_VALUES = 2**20
MAX_SUGGESTED = 64  # characters of an unknown field for which a similar one is looked up
MAX_TOKEN_DIGITS = 10  # of a token id in a text
MAX_SALT_CHARACTERS = 1024
MAX_CHOICES = 16  # answers to one request; each takes one unit of the engine's capacity
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]  # OpenAI's
NO_THINKING = ("none", "minimal")  # efforts that disable thinking

M = TypeVar("M", bound=BaseModel)
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _few_entries(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_ENTRIES:
        raise ValueError(f"it has {len(value)} entries, at most {MAX_ENTRIES} may be in a list")
    return value


def _few_biases(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASED:
        raise ValueError(f"it has {len(value)} tokens, at most {MAX_BIASED} may have one")
    return value


# A list of a million wrong entries is one error, not a million.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True), BeforeValidator(_few_entries)]
StopTexts = Annotated[
    list[str],
    Field(fail_fast=True),
    BeforeValidator(_as_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


class Strict(BaseModel):
    """A model without type conversion that refuses unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, fields: Any) -> Any:
        """Raises an error for the first unknown field. pydantic would make one for each of a million."""
        unknown = next((name for name in fields if name not in cls.model_fields), None) if isinstance(fields, dict) else None
        if unknown is not None:
            raise PydanticCustomError("extra_forbidden", "not a field that this server serves", {"name": unknown})
        return fields


class StreamOptions(Strict):
    """Options of a stream.

    `include_usage` adds a final chunk with the usage, `continuous_usage_stats` (vLLM's) adds the usage to
    every chunk. `include_obfuscation` has no effect: chunks are never padded.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Strict):
    """Fields of chat and text completions alike. The checkpoint's defaults fill the absent ones."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: StopTexts = []
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few_biases)] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: TokenIds = []
    ignore_eos: bool = False
    cache_salt: str = Field("", max_length=MAX_SALT_CHARACTERS)

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, biases: dict[str, float]) -> dict[str, float]:
        for token in biases:
            if not (token.isascii() and token.isdigit() and len(token) <= MAX_TOKEN_DIGITS):
                raise ValueError(f"{short_repr(token)} is not a token id")
        return biases

    @property
    def max_new_tokens(self) -> int | None:
        """Maximum tokens of the answer; None for all that the context holds."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report beside each token's log probability; None for no log probabilities."""
        raise NotImplementedError


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions: OpenAI's fields, and vLLM's additional ones."""

    messages: Objects
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Objects | None = None
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, Any] = {}
    mm_processor_kwargs: dict[str, Any] = {}
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    include_reasoning: bool = True
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    thinking_token_budget: int | None = Field(None, ge=0)
    restore_newlines: bool | None = None

    @field_validator("tools")
    @classmethod
    def _functions(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for i, tool in enumerate(tools or ()):
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ValueError(f'tools[{i}] must be {{"type": "function", "function": {{"name": ...}}}}')
            if not isinstance(function.get("parameters") or {}, dict):
                raise ValueError(
                    f"tools[{i}].function.parameters must be a JSON schema, got {short_repr(function['parameters'])}"
                )
        return tools

    @field_validator("tool_choice")
    @classmethod
    def _known_choice(cls, choice: Any) -> Any:
        function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        if choice not in ("none", "auto", "required") and not (
            isinstance(function, dict) and isinstance(function.get("name"), str)
        ):
            raise ValueError('expected \'none\', \'auto\', \'required\' or {"type": "function", "function": {"name": ...}}')
        return choice

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, but max_completion_tokens is {self.max_completion_tokens}")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        self._check_tool_choice()
        return self

    def _check_tool_choice(self) -> None:
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice is 'required', but there are no tools")
        if isinstance(self.tool_choice, dict) and (name := self.tool_choice["function"]["name"]) not in self.functions:
            raise ValueError(f"tool_choice names {name[:64]!r}, but tools has {', '.join(self.functions) or 'none'}"[:500])

    @property
    def max_new_tokens(self) -> int | None:
        """Maximum tokens of the answer, from either field; None for all that the context holds."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report beside each token's log probability; None for no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def functions(self) -> dict[str, dict[str, Any]]:
        """The functions that may be called: the JSON schema of each one's parameters, by name."""
        tools = () if self.tool_choice == "none" else self.tools or ()
        return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template. An explicit `enable_thinking` overrides the reasoning effort."""
        effort = self.reasoning_effort
        thinking = {} if effort is None else {"enable_thinking": effort not in NO_THINKING}
        return {**thinking, **self.chat_template_kwargs}


CHAT_FIELDS = frozenset(ChatRequest.model_fields)


def parse_chat(body: bytes) -> ChatRequest:
    """Parses and checks a chat request. Raises ApiError 400 that names the field."""
    return checked(json_object(body), ChatRequest)


def json_object(body: bytes) -> dict[str, Any]:
    """Parses a body that must be a JSON object. Raises ApiError 400."""
    raw = _json(body)
    if not isinstance(raw, dict):
        raise ApiError(400, f"the body is a JSON {_json_type(raw)}, expected an object")
    return raw


def checked(raw: Mapping[str, Any], model: type[M], single_value_fields: Mapping[str, Any] = SINGLE_VALUE_FIELDS) -> M:
    """Checks a request's fields. Raises ApiError 400 that names the field.

    Args:
      raw: fields and values as the client sent them.
      model: the request's type.
      single_value_fields: fields that are not the model's and are served with one value only.
    """
    fields = {name: value for name, value in raw.items() if value is not None and name not in IGNORED_FIELDS}
    for name in [name for name in fields if name not in model.model_fields]:
        _check_unserved(name, fields.pop(name), model.model_fields, single_value_fields)
    return validated(model, fields)


def validated(model: type[M], fields: dict[str, Any]) -> M:
    """Returns the fields as a model. Raises ApiError 400 that names the field."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _validation_error(error) from None


def _check_unserved(name: str, value: Any, known: Collection[str], single_value_fields: Mapping[str, Any]) -> None:
    """Raises ApiError unless the field has the one value that is served."""
    if name in single_value_fields:
        served = single_value_fields[name]
        if type(value) is not type(served) or value != served:
            raise ApiError(400, f"{name} is {short_repr(value)}, but only {served!r} is served", name, "unsupported_value")
        return
    near = difflib.get_close_matches(name, known, n=1) if len(name) <= MAX_SUGGESTED else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ApiError(400, f"{short_repr(name)} is not a field that this server serves{hint}", name, "unsupported_parameter")


def _json(body: bytes) -> Any:
    if (number := body.count(b"[") + body.count(b"{")) > MAX_CONTAINERS:
        raise ApiError(400, f"the body has {number} brackets and braces, and at most {MAX_CONTAINERS} may be in a request")
    if (number := number + body.count(b",")) > MAX_VALUES:
        message = f"the body has {number} brackets, braces and commas, and at most {MAX_VALUES} may be in a request"
        raise ApiError(400, message)
    try:
        return parse_json(body.decode())
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error.reason} at byte {error.start}, expected UTF-8") from None
    except ValueError as error:
        raise ApiError(400, f"the body is {error}") from None


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _validation_error(error: ValidationError) -> ApiError:
    """Returns the first error with the field, its value and the expected values."""
    first = error.errors(include_url=False)[0]
    path, reason = _path(first["loc"]), first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        path = _path((*first["loc"], first.get("ctx", {})["name"]))
        return ApiError(400, f"{short_repr(path)} is not a field that this server serves", path, "unsupported_parameter")
    if not path:
        return ApiError(400, reason, reason.split()[0])
    if first["type"] == "missing":
        return ApiError(400, f"{path} is missing", path)
    return ApiError(400, f"{shortened(path)} is {short_repr(first['input'])}: {reason}", path)


def _path(loc: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
