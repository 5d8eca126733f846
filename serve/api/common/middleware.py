"""Around every request: an id, a log line, a limit to its body, and an answer to what nobody expected.

The log says how long and how much, not what: prompts are the users' own, and in the log only where the server was told so.
"""

import dataclasses
import logging
import re
import time
import uuid

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.common.errors import ApiError, internal_error
from serve.engine.engine_client import Cancelled

log = logging.getLogger("serve")

CLIENT_GONE = 499  # nginx's number for a client that did not wait; only the log ever shows it
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclasses.dataclass
class RequestRecord:
    """A request and its answer, as far as the log is concerned. `status` is None until the answer starts."""

    id: str
    status: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    client_gone: bool = False


def request_record(request: Request) -> RequestRecord:
    """The record that `RequestMiddleware` keeps of a request."""
    return request.state.record


class RequestMiddleware:
    """Keeps an `RequestRecord` for each request, and logs it."""

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
            await self._answer(scope, receive, _tagging(send, record), record)
        finally:
            _log_line(scope, record, time.monotonic() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        try:
            await self.app(scope, receive, send)
        except (Cancelled, ClientDisconnect):
            record.client_gone = True
        except Exception:
            log.exception("%s failed", record.id)
            if record.status is not None:
                raise  # half an answer is out: the server must break the connection
            await internal_error().response(scope["path"])(scope, receive, send)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises ApiError 413 as soon as it is known to be too long."""
    too_long = ApiError(413, f"the body is longer than the {max_bytes} bytes allowed", code="request_too_large")
    announced = request.headers.get("Content-Length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_long
    return bytes(body)


def _request_id(headers: Headers) -> str:
    given = headers.get("X-Request-Id", "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _tagging(send: Send, record: RequestRecord) -> Send:
    async def tagged(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            tag = (b"x-request-id", record.id.encode())
            message = {**message, "headers": [*message.get("headers", []), tag]}
        await send(message)

    return tagged


def _log_line(scope: Scope, record: RequestRecord, seconds: float) -> None:
    quiet = scope["path"] in ("/health", "/ready", "/metrics")  # load balancers and Prometheus ask every second
    fields = {
        "request_id": record.id,
        "method": scope["method"],
        "path": scope["path"],
        "status": CLIENT_GONE if record.client_gone else record.status,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "seconds": round(seconds, 3),
    }
    log.log(
        logging.DEBUG if quiet else logging.INFO,
        # the path is quoted: it may hold a line break
        "%(request_id)s %(method)s %(path)r %(status)s prompt_tokens=%(prompt_tokens)d "
        "completion_tokens=%(completion_tokens)d seconds=%(seconds).3f",
        fields,
        extra={"fields": fields},
    )
