"""API keys."""

import hmac

from fastapi import Request

from serve.api.common.errors import ApiError


async def require_key(request: Request) -> None:
    """Refuses a request without one of the server's keys, if it has any. The time it takes tells nothing about them."""
    keys = request.app.state.service.api_keys
    if not keys:
        return
    shown = _shown(request)
    if sum(hmac.compare_digest(shown, key.encode()) for key in keys) == 0:  # a sum: all are compared
        raise ApiError(
            401,
            "a valid API key is needed, as in the header Authorization: Bearer KEY (or x-api-key: KEY)",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _shown(request: Request) -> bytes:
    """The key of a request: OpenAI's header, or Anthropic's."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = request.headers.get("X-Api-Key", "")
    return key.strip().encode("latin-1")
