"""Server-sent events: a JSON object an event."""

import dataclasses
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.common.errors import ApiError, anthropic_content, internal_error, stopped_error
from serve.engine.engine_client import Cancelled, EngineStopped

log = logging.getLogger("serve")
_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode  # `json.dumps` makes one a call


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What differs between APIs.

    Attributes:
      named: whether an event's type stands on a line of its own before it.
      error: the event that tells of an error.
      end: what follows the last event.
    """

    named: bool
    error: Callable[[ApiError], dict[str, Any]]
    end: bytes = b""


def _typed_error(error: ApiError) -> dict[str, Any]:
    fault = error.content["error"]
    return {"type": "error", "code": fault["code"], "message": fault["message"], "param": fault["param"]}


CHAT = Dialect(named=False, error=lambda error: error.content, end=b"data: [DONE]\n\n")
TYPED = Dialect(named=True, error=_typed_error)
ANTHROPIC = Dialect(named=True, error=anthropic_content)


class EventStream(Response):
    """A streamed answer. An error in the middle becomes an event, for the status is out by then.

    Args:
      first: the first event.
      rest: those after it.
      cleanup: closed when the stream has ended, however it did.
      dialect: of the API.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: dict[str, Any], rest: AsyncIterator[dict[str, Any]], cleanup: AsyncExitStack, dialect: Dialect = CHAT
    ):
        self.status_code, self.background = 200, None
        self._first, self._rest, self._cleanup, self._dialect = first, rest, cleanup, dialect
        # no-cache and X-Accel-Buffering: proxies must not collect the pieces
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._cleanup:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send_events(send, scope["state"]["record"].id)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send: Send, request_id: str) -> None:
        try:
            await self._send(send, self._first)
            async for event in self._rest:
                await self._send(send, event)
        except (Cancelled, OSError):  # OSError: how some servers say that the client has gone
            raise Cancelled from None
        except EngineStopped:
            await self._send(send, self._dialect.error(stopped_error()))
        except Exception:
            log.exception("%s failed while streaming", request_id)
            await self._send(send, self._dialect.error(internal_error()))
        await send({"type": "http.response.body", "body": self._dialect.end, "more_body": True})

    async def _send(self, send: Send, event: dict[str, Any]) -> None:
        name = f"event: {event['type']}\n" if self._dialect.named else ""
        await send({"type": "http.response.body", "body": f"{name}data: {_text(event)}\n\n".encode(), "more_body": True})
