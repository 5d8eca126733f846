"""Base of the routes that convert another API's request to a chat request: /v1/messages and /v1/responses."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from serve.api.common.errors import ApiError
from serve.api.common.field_names import (
    Names,
    expect_objects,
    expect_text,
    refuse_fields,
    renamed,
    wrong_value,
)
from serve.api.common.request_pipeline import ParsedRequest
from serve.api.common.schema import ChatRequest, checked, json_object


def client_fields(body: bytes, ignored: frozenset[str], refused: frozenset[str]) -> dict[str, Any]:
    """Parses a body. Raises ApiError.

    Args:
      body: a JSON object.
      ignored: fields to drop; null fields are dropped too.
      refused: fields of the chat API that are not fields of this API.
    """
    raw = {name: value for name, value in json_object(body).items() if value is not None and name not in ignored}
    refuse_fields(raw, refused)
    return raw


def require_fields(raw: Mapping[str, Any], *names: str) -> None:
    """Raises ApiError for the first of the fields that is absent."""
    for name in names:
        if name not in raw:
            raise ApiError(400, f"{name} is missing", name)


def parsed_chat(fields: Mapping[str, Any], names: Names) -> ParsedRequest:
    """Checks the fields of a converted request. Raises ApiError with the client's names for them."""
    with renamed(names):
        return ParsedRequest(checked(fields, ChatRequest), names)


def function_tools(tools: Any, convert: Callable[[dict[str, Any], str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Converts a list of tools.

    Args:
      tools: the client's field `tools`.
      convert: returns the chat API's function object of a tool; takes the tool and its path. Null entries are
        dropped.
    """
    functions = [convert(tool, path) for tool, path in expect_objects(tools, "tools")]
    return [
        {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}
        for function in functions
    ]


def function_choice(name: Any) -> dict[str, Any]:
    """Returns the tool choice that requires a call of one function."""
    return {"type": "function", "function": {"name": name}}


def tool_call(call_id: Any, name: Any, arguments: Any, path: str) -> dict[str, Any]:
    """Returns a tool call of an assistant message. `arguments` is JSON text; `path` leads to the client's
    object."""
    function = {"name": expect_text(name, f"{path}.name"), "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


class Conversation(abc.ABC):
    """Chat messages converted from the messages or items of another API.

    Attributes:
      messages: the chat messages.
      names: chat message, as `messages[i]`, to the path of the client's object that it comes from.
      text_types: content types that hold text, with the key of the text.
      media_types: content types that hold media, with the medium: "image" or "video".
      known_types: all content types, for errors.
    """

    text_types: ClassVar[Mapping[str, str]]
    media_types: ClassVar[Mapping[str, str]]
    known_types: ClassVar[str]

    def __init__(self):
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}

    def add(self, message: dict[str, Any], path: str) -> dict[str, Any]:
        """Appends a chat message and returns it."""
        self.names[f"messages[{len(self.messages)}]"] = path
        self.messages.append(message)
        return message

    def read(self, entries: Any, path: str) -> None:
        """Converts a list of the client's messages or items."""
        for entry, entry_path in expect_objects(entries, path):
            self.read_entry(entry, entry_path)

    @abc.abstractmethod
    def read_entry(self, entry: dict[str, Any], path: str) -> None:
        """Converts one message or item."""

    @abc.abstractmethod
    def media_url(self, medium: str, part: dict[str, Any], path: str) -> str:
        """Returns the URL of an image or video."""

    def content(self, content: Any, path: str) -> Any:
        """Converts a message's content: a text, or a list of parts."""
        if isinstance(content, str):
            return content
        return [self.content_part(part, part_path) for part, part_path in expect_objects(content, path)]

    def content_part(self, part: dict[str, Any], path: str) -> dict[str, Any]:
        """Converts one part of a message's content."""
        kind = part.get("type")
        if isinstance(kind, str) and (key := self.text_types.get(kind)):
            return {"type": "text", "text": expect_text(part.get(key), f"{path}.{key}")}
        if isinstance(kind, str) and (medium := self.media_types.get(kind)):
            return {"type": f"{medium}_url", f"{medium}_url": {"url": self.media_url(medium, part, path)}}
        raise wrong_value(f"{path}.type", kind, self.known_types)
