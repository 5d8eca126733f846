"""Server-sent events: a JSON object an event, and `data: [DONE]` at the end."""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.errors import internal_error, stopped_error
from serve.engine import Cancelled, EngineStopped

log = logging.getLogger("serve")


class EventStream(Response):
    """A streamed answer. An error in the middle becomes an event, for the status is out by then.

    Args:
      first: the first event.
      rest: those after it.
      cleanup: closed when the stream has ended, however it did.
    """

    media_type = "text/event-stream"

    def __init__(self, first: dict[str, Any], rest: AsyncIterator[dict[str, Any]], cleanup: AsyncExitStack):
        self.status_code, self.background = 200, None
        self._first, self._rest, self._cleanup = first, rest, cleanup
        # no-cache and X-Accel-Buffering: proxies must not collect the pieces
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._cleanup:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send_events(send, scope["state"]["exchange"].id)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send: Send, request_id: str) -> None:
        try:
            await _send(send, self._first)
            async for event in self._rest:
                await _send(send, event)
        except (Cancelled, OSError):  # OSError: how some servers say that the client has gone
            raise Cancelled from None
        except EngineStopped:
            await _send(send, stopped_error().content)
        except Exception:
            log.exception("%s failed while streaming", request_id)
            await _send(send, internal_error().content)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})


async def _send(send: Send, event: dict[str, Any]) -> None:
    text = json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})
