"""The response of a generating route: one JSON object, or server-sent events."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from serve.api.common.json_encoding import JsonResponse
from serve.api.common.request_pipeline import ActiveRequest, Prepare, PreparedRequest, submit_request
from serve.api.common.sse import CHAT, Dialect, EventStream


class OutputStream(Protocol):
    """The output of a submitted request in one API's format."""

    async def collect(self) -> dict[str, Any]:
        """Returns the response as one object."""
        ...

    def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the response as events; the first comes with the engine's first delta."""
        ...


async def respond(
    http: Request,
    prepare: Prepare[PreparedRequest],
    open_stream: Callable[[ActiveRequest], OutputStream],
    dialect: Dialect = CHAT,
) -> Response:
    """Submits a request and returns its response.

    A stream's first event is awaited before the response starts, so that an error until then gets its own
    status.

    Args:
      http: the HTTP request, its body not read yet.
      prepare: returns the prepared request.
      open_stream: returns the output stream of the submitted request.
      dialect: event format of the API.
    """
    async with AsyncExitStack() as cleanup:
        request = await submit_request(http, cleanup, prepare)
        stream = open_stream(request)
        if not request.output.stream:
            return JsonResponse(await stream.collect())
        events = stream.events()
        cleanup.push_async_callback(events.aclose)
        return EventStream(await anext(events), events, cleanup.pop_all(), dialect)
