"""What a request to /v1/responses says, as a chat request."""

from typing import Any

from serve.api.common.errors import ApiError
from serve.api.common.field_names import Names, listed, mapped, refuse_fields, renamed, text_of, wrong
from serve.api.common.schema import ChatRequest, checked, json_object

# Of chat completions and not of this API.
_CHATS = frozenset(
    "messages n max_tokens max_completion_tokens response_format reasoning_effort stop logprobs stream_options functions".split()
)
_HARMLESS = frozenset("store stream_options".split())  # nothing is kept, whatever a client says
_ONLY: dict[str, Any] = {"background": False, "truncation": "disabled", "top_logprobs": 0}
_INCLUDED = ["reasoning.encrypted_content"]  # thoughts come as they are, and need no such thing
_STATE = ("previous_response_id", "conversation", "prompt")
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def parse(body: bytes) -> tuple[ChatRequest, Names, dict[str, Any]]:
    """The chat request, the client's names for its fields, and what the client wrote. Raises ApiError."""
    raw = {name: value for name, value in json_object(body).items() if value is not None}
    refuse_fields(raw, _CHATS - _HARMLESS)
    for name in _STATE:
        if name in raw:
            raise ApiError(400, f"{name} is not served: this server keeps no answers; send the whole conversation as input", name)
    for name, value in _ONLY.items():
        if raw.get(name, value) != value:
            raise ApiError(400, f"{name} is {raw[name]!r}, but only {value!r} is served", name, "unsupported_value")
    for i, wanted in enumerate(listed(raw.pop("include", []), "include")):
        if wanted not in _INCLUDED:
            raise wrong(f"include[{i}]", wanted, f"one of {', '.join(_INCLUDED)}")
    chat, names = _chat(raw)
    with renamed(names):
        return checked(chat), names, raw


def _chat(raw: dict[str, Any]) -> tuple[dict[str, Any], Names]:
    own = {"input", "instructions", "max_output_tokens", "reasoning", "text", "tools", "tool_choice", *_ONLY}
    chat = {name: value for name, value in raw.items() if name not in own and name not in _HARMLESS}
    if "input" not in raw:
        raise ApiError(400, "input is missing", "input")
    conversation = _Conversation(raw.get("instructions"))
    conversation.read(raw["input"])
    chat["messages"] = conversation.messages
    if "max_output_tokens" in raw:
        chat["max_completion_tokens"] = raw["max_output_tokens"]
    if effort := mapped(raw.get("reasoning", {}), "reasoning").get("effort"):
        chat["reasoning_effort"] = effort
    if format_ := mapped(raw.get("text", {}), "text").get("format"):
        chat["response_format"] = _format(mapped(format_, "text.format"))
    if "tools" in raw:
        chat["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(listed(raw["tools"], "tools"))]
    if "tool_choice" in raw:
        chat["tool_choice"] = _choice(raw["tool_choice"])
    names = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
    return chat, {**names, "reasoning_effort": "reasoning.effort", **conversation.names}


def _format(format_: dict[str, Any]) -> dict[str, Any]:
    if format_.get("type") != "json_schema":
        return format_
    return {"type": "json_schema", "json_schema": {key: value for key, value in format_.items() if key != "type"}}


def _tool(tool: Any, path: str) -> dict[str, Any]:
    if mapped(tool, path).get("type") != "function":
        raise wrong(f"{path}.type", tool.get("type"), "'function': this server runs no tools of its own")
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type" and value is not None}}


def _choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


class _Conversation:
    """Items as messages: an assistant's thoughts, words and calls, which are items of their own here, become one message."""

    def __init__(self, instructions: Any):
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}
        self._thought = ""
        if instructions is not None:
            self._add({"role": "system", "content": text_of(instructions, "instructions")}, "instructions")

    def read(self, given: Any) -> None:
        """All items of a request's input."""
        if isinstance(given, str):
            self._add({"role": "user", "content": given}, "input")
            return
        for i, item in enumerate(listed(given, "input")):
            path = f"input[{i}]"
            self._item(mapped(item, path), path)

    def _item(self, item: dict[str, Any], path: str) -> None:
        kind = item.get("type", "message")
        if kind == "message":
            self._message(item, path)
        elif kind == "function_call":
            function = {"name": text_of(item.get("name"), f"{path}.name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            self._assistant(path).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = _content(item.get("output"), f"{path}.output")
            self._add({"role": "tool", "tool_call_id": item.get("call_id"), "content": content}, path)
        elif kind == "reasoning":
            parts = [*listed(item.get("content") or [], f"{path}.content"), *listed(item.get("summary") or [], f"{path}.summary")]
            self._thought += "".join(text_of(mapped(part, path).get("text"), path) for part in parts)
        else:
            raise wrong(f"{path}.type", kind, "'message', 'function_call', 'function_call_output' or 'reasoning'")

    def _message(self, item: dict[str, Any], path: str) -> None:
        role, content = text_of(item.get("role"), f"{path}.role"), _content(item.get("content"), f"{path}.content")
        role = "system" if role == "developer" else role
        if role == "assistant":
            self._assistant(path)["content"] = content
        elif role == "system" and self.messages and self.messages[-1]["role"] == "system":
            self._join(content, path)
        else:
            self._add({"role": role, "content": content}, path)

    def _join(self, content: Any, path: str) -> None:
        """The template takes one system message; instructions and a developer's words are one."""
        before = self.messages[-1]
        texts = [before["content"], content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)]
        before["content"] = "\n\n".join(texts)
        self.names[f"messages[{len(self.messages) - 1}]"] = path

    def _assistant(self, path: str) -> dict[str, Any]:
        """The message that an assistant's item belongs to: a call to the words before it."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant" or self._thought:
            self._add({"role": "assistant", "content": None}, path)
            if self._thought:
                self.messages[-1]["reasoning_content"], self._thought = self._thought, ""
        return self.messages[-1]

    def _add(self, message: dict[str, Any], path: str) -> None:
        self.names[f"messages[{len(self.messages)}]"] = path
        self.messages.append(message)


def _content(content: Any, path: str) -> Any:
    if isinstance(content, str):
        return content
    return [_part(mapped(part, f"{path}[{i}]"), f"{path}[{i}]") for i, part in enumerate(listed(content, path))]


def _part(part: dict[str, Any], path: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind in _TEXTS:
        return {"type": "text", "text": text_of(part.get("text"), f"{path}.text")}
    if kind == "refusal":
        return {"type": "text", "text": text_of(part.get("refusal"), f"{path}.refusal")}
    for medium in ("image", "video"):
        if kind == f"input_{medium}":
            url = part.get(f"{medium}_url")
            if not isinstance(url, str):
                raise wrong(f"{path}.{medium}_url", url, "a URL; files that were uploaded before are not served")
            return {"type": f"{medium}_url", f"{medium}_url": {"url": url}}
    raise wrong(f"{path}.type", kind, "'input_text', 'input_image', 'input_video' or 'output_text'")
