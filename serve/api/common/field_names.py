"""Field names of APIs that are converted to chat requests: an error names the field that the client sent."""

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from minicpmv46_jax.short_repr import short_repr
from serve.api.common.errors import ApiError

Names = Mapping[str, str]
"""Fields of a chat request (`max_tokens`, `messages[2]`) to the client's fields."""

MAX_ENTRIES = 2**14  # of a list of messages, items, parts or tools: no context holds as many
_FIELD = re.compile(r"(?<![\w.])(\w+)(\[\d+\])?(?!\w)")  # max_tokens, messages[2]


@contextmanager
def renamed(names: Names) -> Iterator[None]:
    """Replaces the fields that an ApiError names by the client's names."""
    try:
        yield
    except ApiError as error:
        if not names:
            raise
        content = error.content["error"]
        raise ApiError(
            error.status,
            rename(content["message"], names),
            content["param"] and rename(content["param"], names),
            content["code"],
            content["type"],
            error.headers,
        ) from None


def rename(text: str, names: Names) -> str:
    """Returns the text with the client's names for fields.

    Looks up only the names that occur in the text, because a request may have a hundred thousand messages.
    """

    def replace(match: re.Match[str]) -> str:
        return names.get(match[0]) or names.get(match[1], match[1]) + (match[2] or "")

    return _FIELD.sub(replace, text)


def wrong_value(path: str, value: Any, expected: str) -> ApiError:
    """Returns status 400 that names the field, its value and the expected values."""
    shown = short_repr(value) if not isinstance(value, (dict, list)) else type(value).__name__
    return ApiError(400, f"{path} is {shown}, expected {expected}", path)


def expect_list(value: Any, path: str) -> list[Any]:
    """Returns the value if it is a list of at most MAX_ENTRIES. Raises ApiError otherwise."""
    if not isinstance(value, list):
        raise wrong_value(path, value, "a list")
    if len(value) > MAX_ENTRIES:
        raise ApiError(400, f"{path} has {len(value)} entries, at most {MAX_ENTRIES} may be in a list", path)
    return value


def expect_object(value: Any, path: str) -> dict[str, Any]:
    """Returns the value if it is an object. Raises ApiError otherwise."""
    if not isinstance(value, dict):
        raise wrong_value(path, value, "an object")
    return value


def expect_text(value: Any, path: str) -> str:
    """Returns the value if it is a text. Raises ApiError otherwise."""
    if not isinstance(value, str):
        raise wrong_value(path, value, "a text")
    return value


def expect_objects(value: Any, path: str) -> list[tuple[dict[str, Any], str]]:
    """Returns (object, its path) for each entry of a list of objects. Raises ApiError otherwise."""
    paths = (f"{path}[{i}]" for i in itertools.count())
    return [(expect_object(entry, at), at) for entry, at in zip(expect_list(value, path), paths, strict=False)]


def refuse_fields(raw: Mapping[str, Any], fields: frozenset[str]) -> None:
    """Raises ApiError for a field of another API."""
    for name in raw:
        if name in fields:
            raise ApiError(400, f"{short_repr(name)} is not a field that this route serves", name, "unsupported_parameter")
