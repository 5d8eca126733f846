"""Converts a request to Anthropic's /v1/messages to a chat request."""

import json
from typing import Any, ClassVar

from serve.api.common.conversation import (
    Conversation,
    client_fields,
    function_choice,
    function_tools,
    parsed_chat,
    require_fields,
    tool_call,
)
from serve.api.common.field_names import (
    Names,
    expect_list,
    expect_object,
    expect_objects,
    expect_text,
    wrong_value,
)
from serve.api.common.request_pipeline import ParsedRequest

# Fields of chat completions that are not fields of this API.
_CHAT_ONLY = frozenset(
    "n stop max_completion_tokens response_format reasoning_effort logprobs top_logprobs stream_options functions "
    "parallel_tool_calls thinking_token_budget".split()
)
_IGNORED = frozenset("metadata service_tier inference_geo container cache_control".split())
_CONVERTED = frozenset("messages system stop_sequences tools tool_choice thinking".split())
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def parse_message(body: bytes, counting: bool = False) -> ParsedRequest:
    """Parses and checks a request. Raises ApiError with the client's field names.

    Args:
      body: a JSON object.
      counting: True if only the prompt matters, so that `max_tokens` is optional.
    """
    raw = client_fields(body, _IGNORED, _CHAT_ONLY)
    require_fields(raw, "model", "messages", *(() if counting else ("max_tokens",)))
    return parsed_chat(*_chat_fields(raw))


def _chat_fields(raw: dict[str, Any]) -> tuple[dict[str, Any], Names]:
    """Returns (the chat request's fields, the client's names for them)."""
    chat = {name: value for name, value in raw.items() if name not in _CONVERTED}
    conversation = _MessageConversation()
    if "system" in raw:
        conversation.add({"role": "system", "content": _system(raw["system"])}, "system")
    conversation.read(raw["messages"], "messages")
    chat["messages"] = conversation.messages
    if "stop_sequences" in raw:
        chat["stop"] = expect_list(raw["stop_sequences"], "stop_sequences")
    if "tools" in raw:
        chat["tools"] = function_tools(raw["tools"], _function)
    if "tool_choice" in raw:
        chat |= _tool_choice(expect_object(raw["tool_choice"], "tool_choice"))
    chat |= _thinking(
        expect_object(raw.get("thinking", {"type": None}), "thinking"),
        expect_object(raw.get("chat_template_kwargs", {}), "chat_template_kwargs"),
    )
    return chat, {"stop": "stop_sequences", **conversation.names}


def _system(system: Any) -> str:
    if isinstance(system, str):
        return system
    return "\n\n".join(expect_text(block.get("text"), f"{path}.text") for block, path in expect_objects(system, "system"))


def _function(tool: dict[str, Any], path: str) -> dict[str, Any]:
    if tool.get("type", "custom") != "custom":
        raise wrong_value(f"{path}.type", tool["type"], "'custom': this server has no built-in tools")
    return {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool.get("input_schema")}


def _tool_choice(choice: dict[str, Any]) -> dict[str, Any]:
    kind = choice.get("type")
    if kind == "tool":
        chat_choice: Any = function_choice(choice.get("name"))
    elif isinstance(kind, str) and kind in _TOOL_CHOICES:
        chat_choice = _TOOL_CHOICES[kind]
    else:
        raise wrong_value("tool_choice.type", kind, "'auto', 'any', 'tool' or 'none'")
    return {"tool_choice": chat_choice, "parallel_tool_calls": not choice.get("disable_parallel_tool_use", False)}


def _thinking(thinking: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
    kind = thinking.get("type")
    if kind is None:
        return {}
    if kind not in ("enabled", "disabled", "adaptive"):
        raise wrong_value("thinking.type", kind, "'enabled', 'disabled' or 'adaptive'")
    budget = {"thinking_token_budget": thinking["budget_tokens"]} if "budget_tokens" in thinking else {}
    return {"chat_template_kwargs": {"enable_thinking": kind != "disabled", **variables}, **budget}


class _MessageConversation(Conversation):
    """Chat messages converted from Anthropic's. One message may become several: a tool result is its own chat
    message."""

    text_types: ClassVar = {"text": "text"}
    media_types: ClassVar = {"image": "image", "video": "video"}
    known_types = "'text', 'image', 'video', 'tool_use', 'tool_result' or 'thinking'"

    def read_entry(self, entry: dict[str, Any], path: str) -> None:
        """Converts one message."""
        role, content = entry.get("role"), entry.get("content")
        if role not in ("user", "assistant"):
            raise wrong_value(f"{path}.role", role, "'user' or 'assistant'; the system prompt is the field `system`")
        if isinstance(content, str):
            self.add({"role": role, "content": content}, path)
            return
        blocks = expect_objects(content, f"{path}.content")
        self._read_user(blocks, path) if role == "user" else self._read_assistant(blocks, path)

    def _read_user(self, blocks: list[tuple[dict[str, Any], str]], path: str) -> None:
        parts = []
        for block, block_path in blocks:
            if block.get("type") == "tool_result":
                content = self.content(block.get("content", ""), f"{block_path}.content")
                self.add({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}, block_path)
            else:
                parts.append(self.content_part(block, block_path))
        if parts or not blocks:
            self.add({"role": "user", "content": parts}, path)

    def _read_assistant(self, blocks: list[tuple[dict[str, Any], str]], path: str) -> None:
        message: dict[str, Any] = {"role": "assistant", "content": []}
        reasoning = []
        for block, block_path in blocks:
            kind = block.get("type")
            if kind == "tool_use":
                arguments = json.dumps(expect_object(block.get("input"), f"{block_path}.input"))
                call = tool_call(block.get("id"), block.get("name"), arguments, block_path)
                message.setdefault("tool_calls", []).append(call)
            elif kind == "thinking":
                reasoning.append(expect_text(block.get("thinking"), f"{block_path}.thinking"))
            elif kind != "redacted_thinking":
                message["content"].append(self.content_part(block, block_path))
        if reasoning:
            message["reasoning_content"] = "".join(reasoning)
        self.add(message, path)

    def media_url(self, medium: str, part: dict[str, Any], path: str) -> str:
        """Returns the URL of an image's or video's source."""
        path = f"{path}.source"
        source = expect_object(part.get("source"), path)
        kind = source.get("type")
        if kind == "base64":
            media_type = expect_text(source.get("media_type"), f"{path}.media_type")
            return f"data:{media_type};base64,{expect_text(source.get('data'), f'{path}.data')}"
        if kind == "url":
            return expect_text(source.get("url"), f"{path}.url")
        raise wrong_value(f"{path}.type", kind, "'base64' or 'url'")
