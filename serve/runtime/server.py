"""Runs a service on a socket until a signal, and then lets running requests finish."""

import asyncio
import dataclasses
import functools
import gc
import socket
import sys

import uvicorn

from serve.api import Service, create_app
from serve.runtime import logs
from serve.runtime.http_protocol import BoundedHttpProtocol, descriptors_for_connections

DRAIN_S = 20  # for running requests after a signal; a second Ctrl-C ends them at once
DISCONNECT_S = 25  # after a signal, when clients that do not read are disconnected
KEEP_ALIVE_S = 75  # longer than clients keep idle connections, else a client may send into one that closes
# The engine's thread needs the GIL some ten times a step. At Python's default of 5 ms it waited longer for
# the event loop's thread, which turns tokens into events, than its step took.
SWITCH_INTERVAL_S = 0.0005


@dataclasses.dataclass(frozen=True)
class TlsConfig:
    """A certificate and its key, as files in PEM form."""

    ssl_certfile: str
    ssl_keyfile: str | None = None
    ssl_keyfile_password: str | None = None


class Server(uvicorn.Server):
    """A uvicorn server that prints a line once it accepts connections.

    After a stop it aborts the requests that take longer than DRAIN_S with an error, before their connections
    are closed.
    """

    def __init__(self, service: Service, tls: TlsConfig | None = None):
        self._service, self._scheme = service, "http" if tls is None else "https"
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=functools.partial(BoundedHttpProtocol, max_connections=descriptors_for_connections()),
                ws="none",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=DISCONNECT_S,
                timeout_keep_alive=KEEP_ALIVE_S,
                **({} if tls is None else dataclasses.asdict(tls)),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            print(f'ready: {socket_url(listener, self._scheme)}/v1 serves "{self._service.name}"', flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(DRAIN_S, self._service.stop)
        await super().shutdown(sockets)


def run(service: Service, listener: socket.socket, tls: TlsConfig | None = None, log_format: str = "text") -> None:
    """Serves until SIGINT or SIGTERM, and gives running requests DRAIN_S to finish."""
    logs.configure(log_format)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()  # else a collection would scan the start's objects again and stall all streams for 0.2 s
    try:
        Server(service, tls).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises the signal again once it has stopped
        pass
    finally:
        service.close()
    print("stopped", file=sys.stderr)


def socket_url(listener: socket.socket, scheme: str = "http") -> str:
    """Returns a listening socket's address as a URL."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
