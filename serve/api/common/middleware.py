"""Middleware of every request: the Host header, a request id, a log line, limits on bodies, and status 500
for unexpected errors.

The log has durations and token counts. It has prompts only with the option `log_prompts`, because they are
private.
"""

import dataclasses
import logging
import re
import time
import uuid
from collections.abc import Collection
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minicpmv46_jax.short_repr import short_repr, shortened
from serve.api.common.errors import ApiError, internal_error
from serve.engine.engine_client import Cancelled
from serve.runtime.budget import RequestMemory

log = logging.getLogger("serve")

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that disconnected; only the log shows it
_LENGTH = re.compile("[0-9]{1,20}")
_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclasses.dataclass
class RequestRecord:
    """A request's id, status and token counts, for the log and for usage.

    Attributes:
      id: the client's X-Request-Id if it is valid, else a new one.
      status: HTTP status; None until the response starts.
      prompt_tokens: tokens of the prompt, images included.
      completion_tokens: tokens generated so far, over all choices.
      reasoning_tokens: those of them that are reasoning.
      client_gone: True if the client disconnected before the response ended.
    """

    id: str
    status: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    client_gone: bool = False


def request_record(request: Request) -> RequestRecord:
    """Returns the record that `RequestMiddleware` keeps of a request."""
    return request.state.record


class RequestMiddleware:
    """ASGI middleware that keeps a `RequestRecord` for each request, and logs it."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(_request_id(Headers(scope=scope)))
        scope.setdefault("state", {})["record"] = record
        start = time.monotonic()
        try:
            await self._respond(scope, receive, _with_request_id(send, record), record)
        finally:
            _log_request(scope, record, time.monotonic() - start)

    async def _respond(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        try:
            await self.app(scope, receive, send)
        except (Cancelled, ClientDisconnect):
            record.client_gone = True
        except Exception:
            log.exception("%s failed", record.id)
            if record.status is not None:
                raise  # part of the response has been sent, so the server must break the connection
            await internal_error().response(scope["path"])(scope, receive, send)


class HostMiddleware:
    """ASGI middleware that answers only requests for the server's own names.

    A page of another site whose name has been pointed at this server ("DNS rebinding") sends its own name.

    Args:
      app: the application.
      allowed_hosts: host names without ports; `*.example.com` stands for all below example.com.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Collection[str]):
        self.app = app
        self._names = {name.lower() for name in allowed_hosts}
        self._suffixes = tuple(name[1:] for name in self._names if name.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("Host", "") if scope["type"] == "http" else None
        if host is None or self._is_allowed(host):
            await self.app(scope, receive, send)
            return
        message = f"the header Host is {short_repr(host)}, expected one of --allowed-hosts"
        await ApiError(400, message, "Host", "invalid_host").response(scope["path"])(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or name.endswith(self._suffixes)


async def read_body(request: Request, max_bytes: int, memory: RequestMemory) -> bytes:
    """Reads the whole body.

    Raises:
      ApiError: 413 as soon as its length exceeds `max_bytes`.
      EngineFull: the bodies of all requests together are too long for `memory`.
    """
    too_long = ApiError(413, f"the body is longer than the {max_bytes} bytes allowed", code="request_too_large")
    content_length = request.headers.get("Content-Length", "")
    if _LENGTH.fullmatch(content_length) and int(content_length) > max_bytes:
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        memory.hold_source(len(chunk))
        body += chunk
        if len(body) > max_bytes:
            raise too_long
    return bytes(body)


def _request_id(headers: Headers) -> str:
    sent = headers.get("X-Request-Id", "")
    return sent if _VALID_ID.fullmatch(sent) else uuid.uuid4().hex


def _with_request_id(send: Send, record: RequestRecord) -> Send:
    """Wraps `send`: adds the X-Request-Id header to the response and records its status."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            header = (b"x-request-id", record.id.encode())
            message = {**message, "headers": [*message.get("headers", []), header]}
        await send(message)

    return wrapped


def _log_request(scope: Scope, record: RequestRecord, seconds: float) -> None:
    quiet = scope["path"] in ("/health", "/ready", "/metrics")  # load balancers and Prometheus poll them every second
    fields = {
        "request_id": record.id,
        "method": scope["method"],
        "path": shortened(scope["path"]),
        "status": CLIENT_CLOSED_REQUEST if record.client_gone else record.status,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "seconds": round(seconds, 3),
    }
    log.log(
        logging.DEBUG if quiet else logging.INFO,
        # The path is quoted because it may contain a line break.
        "%(request_id)s %(method)s %(path)r %(status)s prompt_tokens=%(prompt_tokens)d "
        "completion_tokens=%(completion_tokens)d seconds=%(seconds).3f",
        fields,
        extra={"fields": fields},
    )
