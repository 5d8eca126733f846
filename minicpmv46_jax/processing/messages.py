"""Normalises chat messages for a chat template and collects their media parts in prompt order.

OpenAI's and transformers' forms are accepted: content is a string or a list of parts of type text, image,
image_url, video or video_url. The released template supports neither "video_url" nor tool arguments in JSON
text, so both are converted.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from minicpmv46_jax.processing.options import MediaOptions
from minicpmv46_jax.short_repr import short_repr
from minicpmv46_jax.strict_json import parse_json

# Part type -> (media kind, keys of the part that may hold its source).
_SOURCES = {
    "image": ("image", ("image", "url", "path")),
    "image_url": ("image", ("image_url",)),
    "video": ("video", ("video", "url", "path")),
    "video_url": ("video", ("video_url",)),
}


class MediaPart(NamedTuple):
    """An image or video of a conversation.

    Attributes:
        kind: "image" or "video".
        source: the part's image or video, unchecked.
        overrides: the message's `mm_processor_kwargs`.
        where: the part's position in the messages, for error messages.
    """

    kind: str
    source: Any
    overrides: Mapping[str, Any]
    where: str


def normalise_messages(messages: Any, reserved: Iterable[str]) -> tuple[list[dict[str, Any]], list[MediaPart]]:
    """Returns copies of the messages for the template, and their media parts in prompt order.

    Keys whose value is None are dropped, like in transformers. `mm_processor_kwargs` moves from a message to
    its media parts.

    Args:
        messages: a list of at least one mapping, each with a role.
        reserved: placeholder strings of images and videos, which no text may contain.
    Raises:
        ValueError: a message or part is malformed; the error names it.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Iterable):
        raise ValueError(f"messages must be a list of messages, got {type(messages).__name__}")
    plain, media, placeholders = [], [], tuple(reserved)
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}: expected a mapping, got {type(message).__name__}")
        copy = {key: value for key, value in message.items() if value is not None}
        if not isinstance(copy.get("role"), str):
            raise ValueError(f"{where}: role must be a string, got {short_repr(copy.get('role'))}")
        overrides = copy.pop("mm_processor_kwargs", {})
        if overrides != {}:  # the check takes microseconds, and there may be a hundred thousand messages
            check_overrides(overrides, f"{where}.mm_processor_kwargs")
        if "content" in copy:
            copy["content"], found = _content(copy["content"], overrides, where, placeholders)
            media += found
        if "tool_calls" in copy:
            copy["tool_calls"] = _tool_calls(copy["tool_calls"], f"{where}.tool_calls")
        plain.append(copy)
    if not plain:
        raise ValueError("messages is empty")
    return plain, media


def check_overrides(overrides: Any, where: str) -> None:
    """Raises ValueError for an unknown or invalid option, even if no media part would use it."""
    MediaOptions(max_slice_nums=1, use_image_id=True).with_overrides(overrides, where)


def _content(
    content: Any, overrides: Mapping[str, Any], where: str, reserved: tuple[str, ...]
) -> tuple[str | list[dict[str, Any]], list[MediaPart]]:
    if isinstance(content, str):
        _check_text(content, where, reserved)
        return content, []
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{where}.content: expected a string or a list of parts, got {type(content).__name__}")
    parts, media = [], []
    for i, part in enumerate(content):
        at = f"{where}.content[{i}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{at}: text must be a string, got {type(part.get('text')).__name__}")
            _check_text(part["text"], at, reserved)
            parts.append({"type": "text", "text": part["text"]})
        elif isinstance(kind, str) and kind in _SOURCES:
            media.append(_media_part(part, kind, overrides, at))
            parts.append({"type": media[-1].kind})
        else:
            raise ValueError(f"{at}: type must be one of text, {', '.join(_SOURCES)}, got {short_repr(kind)}")
    return parts, media


def _check_text(text: str, where: str, reserved: tuple[str, ...]) -> None:
    for token in reserved:
        if token in text:
            raise ValueError(f"{where}: the text contains {token}, which stands for an image or video; send it as a part")


def _media_part(part: Mapping[str, Any], type_: str, overrides: Mapping[str, Any], where: str) -> MediaPart:
    kind, keys = _SOURCES[type_]
    given = [key for key in keys if part.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"{where}: a part of type {type_} needs exactly one of {', '.join(keys)}, got {given}")
    source = part[given[0]]
    if isinstance(source, Mapping):
        if not isinstance(source.get("url"), str):
            raise ValueError(f"{where}: {given[0]}.url must be a string, got {type(source.get('url')).__name__}")
        source = source["url"]
    return MediaPart(kind, source, overrides, where)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Returns tool calls whose arguments are mappings; OpenAI's form has JSON text."""
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"{where}: expected a list of mappings")
    plain = []
    for i, call in enumerate(calls):
        at = f"{where}[{i}]"
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{at}: a tool call needs a function with a name")
        function = dict(function)
        if function.get("arguments") is None:
            function.pop("arguments", None)
        else:
            function["arguments"] = _arguments(function["arguments"], f"{at}.function.arguments")
        plain.append({**call, "function": function} if "function" in call else function)
    return plain


def _arguments(arguments: Any, where: str) -> Mapping[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {type(arguments).__name__}")
    return arguments
