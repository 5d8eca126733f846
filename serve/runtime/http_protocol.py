"""uvicorn's HTTP/1.1 protocol with bounds on all that a connection may send, hold or wait for.

uvicorn with httptools has no limit on headers, and their parser copies a header that arrives in pieces once a
piece. Its connections have no timeout before the first response. A request beyond a bound is refused here,
before the application and its API key.
"""

import asyncio
import sys
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.api.common.errors import ApiError

MAX_HEADER_BYTES = 64 * 2**10  # of the request line, all headers and trailers, and of each chunk's extensions
MAX_HEADERS = 100  # trailers included
HEADER_TIMEOUT_S = 30  # from the first byte of a request, or from connecting, to its last header
BODY_TIMEOUT_S = 30  # in which MIN_BODY_BYTES of a body must arrive
MIN_BODY_BYTES = 4096
WRITE_TIMEOUT_S = 60  # in which a client must read MIN_READ_BYTES, while more than that waits to be sent
MIN_READ_BYTES = 1024
MAX_PIPELINED = 16  # requests of a connection that wait for the response before theirs
MAX_CONNECTIONS = 4096
LINGER_S = 1  # in which the rest of a refused request is dropped, else its client may not see the refusal


class _Refused(Exception):
    """Stops the parser, which is in C, from within one of its callbacks."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """A connection.

    Args:
      *args: of uvicorn's protocol.
      max_connections: connections that the server holds at once. Beyond it an idle one is closed; if there is
        none, the new one is refused.
      **kwargs: of uvicorn's protocol.
    """

    def __init__(self, *args: Any, max_connections: int = MAX_CONNECTIONS, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._max_connections = max_connections
        self._refusal: ApiError | None = None
        self._pipeline_is_full = False
        self._discarding = False  # True once no further byte of the client is read
        self._in_body = False  # True from the last header to the end of the body
        self._advanced = False  # True if the parser has completed something since it was last fed
        self._unparsed_bytes = self._header_bytes = self._num_headers = self._body_bytes = 0
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """True while no complete request head has come and no response is due."""
        return not self._in_body and not self._responding

    @property
    def _responding(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # Connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the clock of the first request."""
        super().connection_made(transport)
        self._start_read_timer(HEADER_TIMEOUT_S, self._header_timeout)
        if len(self.connections) > self._max_connections and not self._close_an_idle_connection():
            self._refuse(ApiError(503, f"the server has {self._max_connections} connections", code="too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks."""
        self._stop_read_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def _close_an_idle_connection(self) -> bool:
        idle = (
            other for other in self.connections if other is not self and isinstance(other, BoundedHttpProtocol) and other.idle
        )
        if (found := next(idle, None)) is None:
            return False
        found._close()
        self.connections.discard(found)
        return True

    def _close(self) -> None:
        self._discarding = True
        self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Sends a refusal and closes the connection.

        Only closes it if the response to an earlier request, or part of a response, is under way.
        """
        self._discarding = True
        self._stop_read_timer()
        if self._in_body:
            own_response_begun = self.cycle.response_started or bool(self.pipeline)
            self.cycle.disconnected = True  # the application gets a disconnect
            self.cycle.message_event.set()
        else:
            own_response_begun = self._responding
        if own_response_begun:
            self.transport.close()
            return
        self._unset_keepalive_if_required()
        self.transport.write(_http_response(error, self._path()))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._start_read_timer(LINGER_S, self.transport.close)

    def _path(self) -> str:
        return getattr(self, "url", b"").decode("latin-1")

    # Bytes of the client

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, and counts the bytes since it last completed a head, piece of body or request."""
        if self._discarding:
            return
        self._advanced = False
        super().data_received(data)
        if self._discarding:
            return
        self._unparsed_bytes = 0 if self._advanced else self._unparsed_bytes + len(data)
        if self._unparsed_bytes > MAX_HEADER_BYTES:
            self._refuse(_too_large())
        elif self._read_timer is None and self.idle and self.timeout_keep_alive_task is None:
            self._start_read_timer(HEADER_TIMEOUT_S, self._header_timeout)

    def send_400_response(self, msg: str) -> None:
        """Refuses a request that the parser or one of its callbacks has refused."""
        if self._pipeline_is_full:
            self._discarding = True
        else:
            self._refuse(self._refusal or ApiError(400, "the request is not valid HTTP/1.1", code="invalid_http"))

    def _unsupported_upgrade_warning(self) -> None:
        """Logs nothing: a request for an upgrade is answered over HTTP/1.1."""

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        """Resets the counts of a request."""
        super().on_message_begin()
        self._header_bytes = self._num_headers = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Counts bytes of the request line."""
        self._count_header_bytes(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Counts a header or trailer. Drops trailers, because the application has the headers already."""
        self._num_headers += 1
        self._count_header_bytes(len(name) + len(value) + 4)
        if not self._in_body:
            super().on_header(name, value)

    def _count_header_bytes(self, number: int) -> None:
        self._header_bytes += number
        if self._header_bytes > MAX_HEADER_BYTES or self._num_headers > MAX_HEADERS:
            self._refusal = _too_large()
            raise _Refused

    def on_headers_complete(self) -> None:
        """Starts the request, or queues it behind those before it."""
        self._advanced = True
        self._stop_read_timer()
        if len(self.pipeline) >= MAX_PIPELINED:
            # The requests so far are answered, then the connection closes: the client sends the others again.
            self.cycle.keep_alive = False
            self._pipeline_is_full = True
            raise _Refused
        super().on_headers_complete()
        self._in_body = True
        self._start_read_timer(BODY_TIMEOUT_S, self._body_timeout)

    def on_body(self, body: bytes) -> None:
        """Passes on a piece of a body."""
        self._advanced = True
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Ends a request."""
        self._advanced, self._in_body = True, False
        self._stop_read_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Ends a response. A body that has not come to its end by then has BODY_TIMEOUT_S left."""
        super().on_response_complete()
        if self._in_body and not self._responding and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._start_read_timer(BODY_TIMEOUT_S, self._close)

    # Clocks

    def _start_read_timer(self, seconds: float, expire: Any) -> None:
        self._stop_read_timer()
        self._read_timer = self.loop.call_later(seconds, expire)

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _header_timeout(self) -> None:
        self._read_timer = None
        if self._unparsed_bytes == 0:
            self._close()  # no request has begun
        elif not self._responding:
            self._refuse(_timeout(f"the headers were not complete after {HEADER_TIMEOUT_S} seconds"))

    def _body_timeout(self) -> None:
        waits_for_us = self.flow.read_paused or self.cycle.waiting_for_100_continue
        if waits_for_us or self._body_bytes >= MIN_BODY_BYTES:
            self._body_bytes = 0
            self._start_read_timer(BODY_TIMEOUT_S, self._body_timeout)
        else:
            rate = f"{self._body_bytes} bytes of the body came in {BODY_TIMEOUT_S} seconds"
            self._refuse(_timeout(f"{rate}, at least {MIN_BODY_BYTES} must"))

    def pause_writing(self) -> None:
        """Starts the clock of a client that does not read."""
        super().pause_writing()
        self._stop_write_timer()
        self._watch_writing(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Stops it."""
        self._stop_write_timer()
        super().resume_writing()

    def _watch_writing(self, unsent: int) -> None:
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self._write_timeout, unsent)

    def _write_timeout(self, unsent_before: int) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent_before - unsent < MIN_READ_BYTES:
            self.transport.abort()
        else:
            self._watch_writing(unsent)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def descriptors_for_connections() -> int:
    """Raises the limit of open files as far as it may, and returns the connections that the server may hold.

    Half of the descriptors stay for media, processes and libraries.
    """
    if sys.platform == "win32":  # sockets are no files there
        return MAX_CONNECTIONS
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)


def _too_large() -> ApiError:
    message = f"the request line and headers are longer than {MAX_HEADER_BYTES} bytes or more than {MAX_HEADERS}"
    return ApiError(431, message, code="headers_too_large")


def _timeout(message: str) -> ApiError:
    return ApiError(408, message, code="request_timeout")


def _http_response(error: ApiError, path: str) -> bytes:
    response = error.response(path)
    head = [(b"connection", b"close"), *response.raw_headers]
    lines = b"".join(b"%b: %b\r\n" % header for header in head)
    return b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (error.status, HTTPStatus(error.status).phrase.encode(), lines, response.body)
