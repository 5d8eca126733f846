"""API keys."""

import hmac

from fastapi import Request

from serve.api.errors import ApiError


async def require_key(request: Request) -> None:
    """Refuses a request without the server's key, if it has one. Takes the same time however much of a wrong key is right."""
    key = request.app.state.service.api_key
    if key is None:
        return
    scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(shown.strip().encode("latin-1"), key.encode()):
        raise ApiError(
            401,
            "a valid API key is needed, as in the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
