"""Bounded text of values for error messages: a value from a request may be megabytes long."""

import itertools
import reprlib
from collections.abc import Mapping
from typing import Any

MAX_CHARACTERS = 200


class _Repr(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = self.maxlong = MAX_CHARACTERS

    def repr_dict(self, x: Mapping[Any, Any], level: int) -> str:
        """Returns the repr of the first entries. reprlib sorts all keys, of which there may be a million."""
        return super().repr_dict(dict(itertools.islice(x.items(), self.maxdict + 1)), level)


_REPR = _Repr()


def short_repr(value: object) -> str:
    """Returns the repr of a value, shortened to `MAX_CHARACTERS`."""
    return shortened(_REPR.repr(value))


def shortened(text: str, limit: int = MAX_CHARACTERS) -> str:
    """Returns the text, with an ellipsis in its middle if it has more than `limit` characters."""
    if len(text) <= limit:
        return text
    head = (limit - 3) // 2
    return f"{text[:head]}...{text[head + 3 - limit :]}"
