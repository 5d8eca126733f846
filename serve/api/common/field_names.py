"""What the other APIs share: their requests become chat requests, and mistakes found there are told in the client's own words."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from serve.api.common.errors import ApiError

Names = Mapping[str, str]
"""From the fields of a chat request (`max_tokens`, `messages[2]`) to those that the client wrote."""


@contextmanager
def renamed(names: Names) -> Iterator[None]:
    """Rewrites the fields that a refusal names."""
    try:
        yield
    except ApiError as error:
        if not names:
            raise
        fault = error.content["error"]
        raise ApiError(
            error.status,
            rename(fault["message"], names),
            fault["param"] and rename(fault["param"], names),
            fault["code"],
            fault["type"],
            error.headers,
        ) from None


def rename(text: str, names: Names) -> str:
    """A text with the client's names for fields."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = "|".join(rf"(?<![\w.]){re.escape(name)}(?!\w)" for name in longest_first)
    return re.sub(pattern, lambda match: names[match[0]], text)


def wrong(path: str, value: Any, wanted: str) -> ApiError:
    """A refusal that names the field and both values."""
    shown = repr(value) if not isinstance(value, (dict, list)) else type(value).__name__
    return ApiError(400, f"{path} is {shown[:200]}, expected {wanted}", path)


def listed(value: Any, path: str) -> list[Any]:
    """A list. Raises ApiError."""
    if not isinstance(value, list):
        raise wrong(path, value, "a list")
    return value


def mapped(value: Any, path: str) -> dict[str, Any]:
    """An object. Raises ApiError."""
    if not isinstance(value, dict):
        raise wrong(path, value, "an object")
    return value


def text_of(value: Any, path: str) -> str:
    """A text. Raises ApiError."""
    if not isinstance(value, str):
        raise wrong(path, value, "a text")
    return value


def refuse_fields(raw: Mapping[str, Any], fields: frozenset[str]) -> None:
    """Refuses fields that are another API's."""
    for name in raw:
        if name in fields:
            raise ApiError(400, f"{name!r} is not a field that this route serves", name, "unsupported_parameter")
