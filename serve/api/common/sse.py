"""Responses as server-sent events, one JSON object per event."""

import dataclasses
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.common.errors import ApiError, anthropic_content, constraint_error, internal_error, stopped_error
from serve.api.common.json_encoding import encode_json
from serve.engine.engine_client import Cancelled, EngineStopped
from serve.structured_output.grammar import ConstraintFailed

log = logging.getLogger("serve")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The event format of an API.

    Attributes:
      named: True if a line with the event's type precedes its data.
      error: returns the event that reports an error.
      end: bytes after the last event.
    """

    named: bool
    error: Callable[[ApiError], dict[str, Any]]
    end: bytes = b""


def _typed_error(error: ApiError) -> dict[str, Any]:
    content = error.content["error"]
    return {"type": "error", "code": content["code"], "message": content["message"], "param": content["param"]}


CHAT = Dialect(named=False, error=lambda error: error.content, end=b"data: [DONE]\n\n")
TYPED = Dialect(named=True, error=_typed_error)
ANTHROPIC = Dialect(named=True, error=anthropic_content)


class EventStream(Response):
    """A streamed response. An error after the first event becomes an event, because the status has been sent.

    Args:
      first: the first event.
      rest: the later events.
      cleanup: closed when the stream ends, normally or not.
      dialect: the API's event format.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: dict[str, Any], rest: AsyncIterator[dict[str, Any]], cleanup: AsyncExitStack, dialect: Dialect = CHAT
    ):
        self.status_code, self.background = 200, None
        self._first, self._rest, self._cleanup, self._dialect = first, rest, cleanup, dialect
        # no-cache and X-Accel-Buffering: proxies must not buffer events
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
        except (Cancelled, OSError):  # some servers raise OSError after a disconnect
            raise Cancelled from None
        except EngineStopped as error:
            await self._send(send, self._dialect.error(stopped_error(error)))
        except ConstraintFailed as error:
            await self._send(send, self._dialect.error(constraint_error(error)))
        except Exception:
            log.exception("%s failed while streaming", request_id)
            await self._send(send, self._dialect.error(internal_error()))
        await send({"type": "http.response.body", "body": self._dialect.end, "more_body": True})

    async def _send(self, send: Send, event: dict[str, Any]) -> None:
        name = f"event: {event['type']}\n".encode() if self._dialect.named else b""
        await send({"type": "http.response.body", "body": b"%bdata: %b\n\n" % (name, encode_json(event)), "more_body": True})
