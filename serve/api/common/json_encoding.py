"""JSON of responses.

Text that the model or a client wrote may have lone surrogates, which UTF-8 cannot encode. They are written as
U+FFFD, because an answer must not fail at its end.
"""

import json
from typing import Any

from fastapi.responses import JSONResponse

from minicpmv46_jax.strict_json import replace_surrogates

_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":")
).encode  # reused: `json.dumps` builds one a call


def encode_json(content: Any) -> bytes:
    """Returns the JSON text of an object, in UTF-8."""
    text = _encode(content)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return replace_surrogates(text).encode()


class JsonResponse(JSONResponse):
    """A response of one JSON object."""

    def render(self, content: Any) -> bytes:
        """Returns the body."""
        return encode_json(content)
