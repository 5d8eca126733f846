"""API keys."""

import hmac

from fastapi import Request

from serve.api.common.errors import ApiError


async def require_key(request: Request) -> None:
    """Raises ApiError 401 unless the request has one of the server's keys, if the server has any.

    The comparison takes the same time for every wrong key, so that its duration reveals no part of a key.
    """
    keys = request.app.state.service.api_keys
    if not keys:
        return
    sent = _sent_key(request)
    if sum(hmac.compare_digest(sent, key.encode()) for key in keys) == 0:  # a sum compares all keys, `any` would not
        raise ApiError(
            401,
            "a valid API key is needed, as in the header Authorization: Bearer KEY (or x-api-key: KEY)",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _sent_key(request: Request) -> bytes:
    """Returns the request's key, from OpenAI's header or Anthropic's."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = request.headers.get("X-Api-Key", "")
    return key.strip().encode("latin-1")
