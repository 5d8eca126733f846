"""Error objects of OpenAI's API (of Anthropic's on its routes), and the HTTP status of each kind of error."""

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from minicpmv46_jax.short_repr import shortened
from serve.api.common.json_encoding import JsonResponse
from serve.engine.engine_client import EngineFull, EngineStopped, RequestRejected
from serve.structured_output.grammar import ConstraintFailed

log = logging.getLogger("serve")

MAX_MESSAGE = 1000  # characters of an error message, whatever a client's value is that it names
MAX_PARAM = 200
RETRY_AFTER_S = 1  # capacity is freed request by request, so a retry may soon succeed
INTERNAL = "the server failed to answer; its log has the details under this request's X-Request-Id"

ANTHROPIC_ROUTES = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}

_PATH = re.compile(r"([a-z_]+)(?:\[\d+\]|\.[a-z_]+)*")  # messages[0].content[1]


class ApiError(Exception):
    """A response with an error status.

    `content` is OpenAI's error object. Its message is one line of at most MAX_MESSAGE characters.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        type_: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ):
        message = shortened(message, MAX_MESSAGE).replace("\n", " ")
        param = None if param is None else param[:MAX_PARAM]
        super().__init__(message)
        self.status, self.headers = status, headers
        self.content = {"error": {"message": message, "type": type_, "param": param, "code": code}}

    def response(self, path: str) -> JsonResponse:
        """Returns the HTTP response in the format of the API that `path` belongs to."""
        content = anthropic_content(self) if path.startswith(ANTHROPIC_ROUTES) else self.content
        return JsonResponse(content, self.status, self.headers)


def anthropic_content(error: ApiError) -> dict[str, Any]:
    """Returns Anthropic's error object. It has no field for the parameter, but the message names it."""
    kind = ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.content["error"]["message"]}}


def internal_error() -> ApiError:
    """Returns status 500 without details: the log has them, clients must not see them."""
    return ApiError(500, INTERNAL, type_="server_error", code="internal_error")


def stopped_error(error: EngineStopped) -> ApiError:
    """Returns status 503, for requests that a stopping or failed engine gives up."""
    return ApiError(503, str(error), code=error.code, type_="server_error")


def constraint_error(error: ConstraintFailed) -> ApiError:
    """Returns status 400 that names the field, for a format that could not be followed to its end."""
    return ApiError(400, f"{error.field or 'the format'}: {error}", error.field)


@contextmanager
def value_errors_as_400(fields: Collection[str], param: str | None = None) -> Iterator[None]:
    """Converts the errors that a client's values cause in the library to ApiError 400.

    A TypeError or OverflowError is logged too, because a check of that value is missing.

    Args:
      fields: the request's fields. If the message starts with one of them or a path into one, `param` becomes
        that path.
      param: the field at fault if the message names none.
    """
    try:
        yield
    except RecursionError:  # raised by a template or schema on nesting that JSON itself still accepts
        raise ApiError(400, f"{param or 'the body'} is nested too deeply", param) from None
    except ValueError as error:
        path = _PATH.match(str(error))
        raise ApiError(400, str(error), path[0] if path and path[1] in fields else param) from error
    except (TypeError, OverflowError) as error:
        log.warning("a value of a request has no check", exc_info=True)
        raise ApiError(400, f"{param or 'the body'} has a value that cannot be used: {error}", param) from error


def install(app: FastAPI) -> None:
    """Installs exception handlers, so that the app responds to every failure with an error object."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JsonResponse:
        return error.response(request.url.path)

    @app.exception_handler(EngineFull)
    async def engine_full(request: Request, error: EngineFull) -> JsonResponse:
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        return ApiError(429, str(error), None, "rate_limit_exceeded", "rate_limit_error", headers).response(request.url.path)

    @app.exception_handler(EngineStopped)
    async def engine_stopped(request: Request, error: EngineStopped) -> JsonResponse:
        return stopped_error(error).response(request.url.path)

    @app.exception_handler(ConstraintFailed)
    async def constraint_failed(request: Request, error: ConstraintFailed) -> JsonResponse:
        return constraint_error(error).response(request.url.path)

    @app.exception_handler(RequestRejected)
    async def request_rejected(request: Request, error: RequestRejected) -> JsonResponse:
        return ApiError(400, str(error)).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def routing_error(request: Request, error: HTTPException) -> JsonResponse:
        message = f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase}"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return ApiError(error.status_code, message, code=code, headers=_headers(error)).response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def parameter_error(request: Request, error: RequestValidationError) -> JsonResponse:
        first = error.errors()[0]
        return ApiError(400, first["msg"], ".".join(map(str, first["loc"]))).response(request.url.path)


def _headers(error: HTTPException) -> dict[str, Any] | None:
    return None if error.headers is None else dict(error.headers)
