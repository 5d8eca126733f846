"""What a request to Anthropic's /v1/messages says, as a chat request."""

import json
from typing import Any

from serve.api.common.errors import ApiError
from serve.api.common.field_names import Names, listed, mapped, refuse_fields, renamed, text_of, wrong
from serve.api.common.schema import ChatRequest, checked, json_object

# Of chat completions and not of this API.
_CHATS = frozenset(
    "n stop max_completion_tokens response_format reasoning_effort logprobs top_logprobs stream_options functions "
    "parallel_tool_calls thinking_token_budget".split()
)
_HARMLESS = frozenset("metadata service_tier inference_geo container cache_control".split())
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def parse(body: bytes, counting: bool = False) -> tuple[ChatRequest, Names]:
    """The chat request, and the client's names for its fields. Raises ApiError.

    Args:
      body: JSON.
      counting: whether only the prompt matters, so that no limit to the answer is needed.
    """
    raw = {name: value for name, value in json_object(body).items() if value is not None and name not in _HARMLESS}
    refuse_fields(raw, _CHATS)
    for name in ("model", "messages") if counting else ("model", "messages", "max_tokens"):
        if name not in raw:
            raise ApiError(400, f"{name} is missing", name)
    chat, names = _chat(raw)
    with renamed(names):
        return checked(chat), names


def _chat(raw: dict[str, Any]) -> tuple[dict[str, Any], Names]:
    own = {"messages", "system", "stop_sequences", "tools", "tool_choice", "thinking"}
    chat = {name: value for name, value in raw.items() if name not in own}
    conversation = _Conversation()
    if "system" in raw:
        conversation.add({"role": "system", "content": _system(raw["system"])}, "system")
    for i, message in enumerate(listed(raw["messages"], "messages")):
        conversation.read(mapped(message, f"messages[{i}]"), f"messages[{i}]")
    chat["messages"] = conversation.messages
    if "stop_sequences" in raw:
        chat["stop"] = listed(raw["stop_sequences"], "stop_sequences")
    if "tools" in raw:
        chat["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(listed(raw["tools"], "tools"))]
    if "tool_choice" in raw:
        chat |= _choice(mapped(raw["tool_choice"], "tool_choice"))
    chat |= _thinking(
        mapped(raw.get("thinking", {"type": None}), "thinking"),
        mapped(raw.get("chat_template_kwargs", {}), "chat_template_kwargs"),
    )
    return chat, {"stop": "stop_sequences", **conversation.names}


def _system(system: Any) -> str:
    if isinstance(system, str):
        return system
    blocks = [mapped(block, f"system[{i}]") for i, block in enumerate(listed(system, "system"))]
    return "\n\n".join(text_of(block.get("text"), f"system[{i}].text") for i, block in enumerate(blocks))


def _tool(tool: Any, path: str) -> dict[str, Any]:
    if mapped(tool, path).get("type", "custom") != "custom":
        raise wrong(f"{path}.type", tool["type"], "'custom': this server runs no tools of its own")
    function = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool.get("input_schema")}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    kind = choice.get("type")
    if kind == "tool":
        wanted: Any = {"type": "function", "function": {"name": choice.get("name")}}
    elif kind in _CHOICES:
        wanted = _CHOICES[kind]
    else:
        raise wrong("tool_choice.type", kind, "'auto', 'any', 'tool' or 'none'")
    return {"tool_choice": wanted, "parallel_tool_calls": not choice.get("disable_parallel_tool_use", False)}


def _thinking(thinking: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
    kind = thinking.get("type")
    if kind is None:
        return {}
    if kind not in ("enabled", "disabled", "adaptive"):
        raise wrong("thinking.type", kind, "'enabled', 'disabled' or 'adaptive'")
    budget = {"thinking_token_budget": thinking["budget_tokens"]} if "budget_tokens" in thinking else {}
    return {"chat_template_kwargs": {"enable_thinking": kind != "disabled", **variables}, **budget}


class _Conversation:
    """Messages whose blocks are spread over messages of the chat API: a tool's result is one of its own there."""

    def __init__(self):
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}

    def add(self, message: dict[str, Any], path: str) -> None:
        """One more."""
        self.names[f"messages[{len(self.messages)}]"] = path
        self.messages.append(message)

    def read(self, message: dict[str, Any], path: str) -> None:
        """One of the client's."""
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant"):
            raise wrong(f"{path}.role", role, "'user' or 'assistant'; the system's words are the field `system`")
        if isinstance(content, str):
            self.add({"role": role, "content": content}, path)
            return
        blocks = [
            (mapped(b, f"{path}.content[{i}]"), f"{path}.content[{i}]") for i, b in enumerate(listed(content, f"{path}.content"))
        ]
        self._user(blocks, path) if role == "user" else self._assistant(blocks, path)

    def _user(self, blocks: list[tuple[dict[str, Any], str]], path: str) -> None:
        parts = []
        for block, at in blocks:
            if block.get("type") == "tool_result":
                content = block.get("content", "")
                content = content if isinstance(content, str) else [_part(mapped(b, at), at) for b in listed(content, at)]
                self.add({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}, at)
            else:
                parts.append(_part(block, at))
        if parts or not blocks:
            self.add({"role": "user", "content": parts}, path)

    def _assistant(self, blocks: list[tuple[dict[str, Any], str]], path: str) -> None:
        message: dict[str, Any] = {"role": "assistant", "content": []}
        for block, at in blocks:
            kind = block.get("type")
            if kind == "tool_use":
                function = {
                    "name": text_of(block.get("name"), f"{at}.name"),
                    "arguments": json.dumps(mapped(block.get("input"), at)),
                }
                call = {"id": block.get("id"), "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
            elif kind == "thinking":
                message["reasoning_content"] = message.get("reasoning_content", "") + text_of(block.get("thinking"), at)
            elif kind != "redacted_thinking":
                message["content"].append(_part(block, at))
        self.add(message, path)


def _part(block: dict[str, Any], path: str) -> dict[str, Any]:
    kind = block.get("type")
    if kind == "text":
        return {"type": "text", "text": text_of(block.get("text"), f"{path}.text")}
    if kind in ("image", "video"):
        url = _source(mapped(block.get("source"), f"{path}.source"), f"{path}.source")
        return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    raise wrong(f"{path}.type", kind, "'text', 'image', 'video', 'tool_use', 'tool_result' or 'thinking'")


def _source(source: dict[str, Any], path: str) -> str:
    kind = source.get("type")
    if kind == "base64":
        media_type, data = text_of(source.get("media_type"), f"{path}.media_type"), text_of(source.get("data"), f"{path}.data")
        return f"data:{media_type};base64,{data}"
    if kind == "url":
        return text_of(source.get("url"), f"{path}.url")
    raise wrong(f"{path}.type", kind, "'base64' or 'url'")
