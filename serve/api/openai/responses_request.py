"""Converts a request to /v1/responses to a chat request."""

from typing import Any, ClassVar

from minicpmv46_jax.short_repr import short_repr
from serve.api.common.conversation import (
    Conversation,
    client_fields,
    function_choice,
    function_tools,
    parsed_chat,
    require_fields,
    tool_call,
)
from serve.api.common.errors import ApiError
from serve.api.common.field_names import (
    Names,
    expect_list,
    expect_object,
    expect_objects,
    expect_text,
    wrong_value,
)
from serve.api.common.request_pipeline import ParsedRequest

_IGNORED = frozenset("store stream_options".split())  # nothing is stored, whatever the client sets
# Fields of chat completions that are not fields of this API.
_CHAT_ONLY = frozenset(
    "messages n max_tokens max_completion_tokens response_format reasoning_effort stop logprobs functions".split()
)
_SINGLE_VALUE_FIELDS: dict[str, Any] = {"background": False, "truncation": "disabled", "top_logprobs": 0}
_CONVERTED = frozenset("input instructions max_output_tokens reasoning text tools tool_choice".split())
_INCLUDED = ["reasoning.encrypted_content"]  # accepted without effect: reasoning is returned as plain text
_STATE = ("previous_response_id", "conversation", "prompt")


def parse_response(body: bytes) -> tuple[ParsedRequest, dict[str, Any]]:
    """Parses and checks a request. Returns (parsed request, the client's fields). Raises ApiError."""
    raw = client_fields(body, _IGNORED, _CHAT_ONLY)
    for name in _STATE:
        if name in raw:
            raise ApiError(400, f"{name} is not served: this server keeps no answers; send the whole conversation as input", name)
    for name, value in _SINGLE_VALUE_FIELDS.items():
        if raw.get(name, value) != value:
            raise ApiError(400, f"{name} is {short_repr(raw[name])}, but only {value!r} is served", name, "unsupported_value")
    for i, included in enumerate(expect_list(raw.pop("include", []), "include")):
        if included not in _INCLUDED:
            raise wrong_value(f"include[{i}]", included, f"one of {', '.join(_INCLUDED)}")
    require_fields(raw, "input")
    return parsed_chat(*_chat_fields(raw)), raw


def _chat_fields(raw: dict[str, Any]) -> tuple[dict[str, Any], Names]:
    """Returns (the chat request's fields, the client's names for them)."""
    chat = {name: value for name, value in raw.items() if name not in _CONVERTED and name not in _SINGLE_VALUE_FIELDS}
    conversation = _ItemConversation()
    if "instructions" in raw:
        conversation.add({"role": "system", "content": expect_text(raw["instructions"], "instructions")}, "instructions")
    conversation.read(raw["input"], "input")
    chat["messages"] = conversation.messages
    if "max_output_tokens" in raw:
        chat["max_completion_tokens"] = raw["max_output_tokens"]
    if effort := expect_object(raw.get("reasoning", {}), "reasoning").get("effort"):
        chat["reasoning_effort"] = effort
    if format_ := expect_object(raw.get("text", {}), "text").get("format"):
        chat["response_format"] = _response_format(expect_object(format_, "text.format"))
    if "tools" in raw:
        chat["tools"] = function_tools(raw["tools"], _function)
    if "tool_choice" in raw:
        chat["tool_choice"] = _tool_choice(raw["tool_choice"])
    names = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
    return chat, {**names, "reasoning_effort": "reasoning.effort", **conversation.names}


def _response_format(format_: dict[str, Any]) -> dict[str, Any]:
    if format_.get("type") != "json_schema":
        return format_
    return {"type": "json_schema", "json_schema": {key: value for key, value in format_.items() if key != "type"}}


def _function(tool: dict[str, Any], path: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise wrong_value(f"{path}.type", tool.get("type"), "'function': this server has no built-in tools")
    return {key: value for key, value in tool.items() if key != "type"}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return function_choice(choice.get("name"))
    return choice


class _ItemConversation(Conversation):
    """Chat messages converted from items. An assistant's reasoning, text and calls are separate items of one
    chat message."""

    text_types: ClassVar = {
        **dict.fromkeys(("input_text", "output_text", "text", "summary_text", "reasoning_text"), "text"),
        "refusal": "refusal",
    }
    media_types: ClassVar = {"input_image": "image", "input_video": "video"}
    known_types = "'input_text', 'input_image', 'input_video' or 'output_text'"

    def __init__(self):
        super().__init__()
        # Texts are joined once, at the end: a request may have a hundred thousand items.
        self._reasoning: list[str] = []  # of items whose message has not come yet
        self._system: list[tuple[dict[str, Any], list[str]]] = []  # system messages of several items, and their texts

    def read(self, entries: Any, path: str) -> None:
        """Converts a request's input: a text, or a list of items."""
        if isinstance(entries, str):
            self.add({"role": "user", "content": entries}, path)
        else:
            super().read(entries, path)
        for message, texts in self._system:
            message["content"] = "\n\n".join(texts)

    def read_entry(self, entry: dict[str, Any], path: str) -> None:
        """Converts one item."""
        kind = entry.get("type", "message")
        if kind == "message":
            self._read_message(entry, path)
        elif kind == "function_call":
            call = tool_call(entry.get("call_id"), entry.get("name"), entry.get("arguments"), path)
            self._assistant_message(path).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = self.content(entry.get("output"), f"{path}.output")
            self.add({"role": "tool", "tool_call_id": entry.get("call_id"), "content": content}, path)
        elif kind == "reasoning":
            for name in ("content", "summary"):
                for part, part_path in expect_objects(entry.get(name) or [], f"{path}.{name}"):
                    self._reasoning.append(expect_text(part.get("text"), f"{part_path}.text"))
        else:
            raise wrong_value(f"{path}.type", kind, "'message', 'function_call', 'function_call_output' or 'reasoning'")

    def _read_message(self, item: dict[str, Any], path: str) -> None:
        role, content = expect_text(item.get("role"), f"{path}.role"), self.content(item.get("content"), f"{path}.content")
        role = "system" if role == "developer" else role
        if role == "assistant":
            self._assistant_message(path)["content"] = content
        elif role == "system" and self.messages and self.messages[-1]["role"] == "system":
            self._append_to_system(content, path)
        else:
            self.add({"role": role, "content": content}, path)

    def _append_to_system(self, content: Any, path: str) -> None:
        """Appends to the system message, because the template takes one: instructions and developer messages
        share it."""
        system = self.messages[-1]
        if not self._system or self._system[-1][0] is not system:
            self._system.append((system, [_as_text(system["content"])]))
        self._system[-1][1].append(_as_text(content))
        self.names[f"messages[{len(self.messages) - 1}]"] = path

    def _assistant_message(self, path: str) -> dict[str, Any]:
        """Returns the chat message that an assistant's item belongs to: the last one, or a new one."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") == "assistant" and not self._reasoning:
            return last
        message = self.add({"role": "assistant", "content": None}, path)
        if self._reasoning:
            message["reasoning_content"], self._reasoning = "".join(self._reasoning), []
        return message

    def media_url(self, medium: str, part: dict[str, Any], path: str) -> str:
        """Returns the URL of an image or video."""
        url = part.get(f"{medium}_url")
        if not isinstance(url, str):
            raise wrong_value(f"{path}.{medium}_url", url, "a URL; uploaded files are not served")
        return url


def _as_text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)
