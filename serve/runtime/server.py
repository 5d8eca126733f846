"""Runs a service on a socket until a signal, and then lets running requests finish."""

import asyncio
import dataclasses
import functools
import gc
import logging
import socket
import sys
from types import FrameType

import uvicorn

from serve.api import Service, create_app
from serve.runtime import logs
from serve.runtime.exit_watchdog import exit_after, exit_now
from serve.runtime.http_protocol import BoundedHttpProtocol, descriptors_for_connections

log = logging.getLogger("serve")

DRAIN_S = 20  # for running requests after a signal; a second signal ends the process at once
DISCONNECT_S = 22  # after a signal, when clients that do not read are disconnected
EXIT_S = 25  # after a signal, when the process ends whatever is under way
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
    are closed. It stops by itself once the engine has failed.

    Args:
      service: the service.
      tls: certificate of https; None for http.

    Attributes:
      status: the process's exit status.
    """

    def __init__(self, service: Service, tls: TlsConfig | None = None):
        self._service, self._scheme = service, "http" if tls is None else "https"
        self.status = 0
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

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stops the server at the first signal, and ends the process at the second."""
        if self.should_exit:
            exit_now(128 + sig)
        exit_after(EXIT_S, self.status)
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Returns True if the server must stop; called ten times a second."""
        if self._service.engine.failed is not None and not self.should_exit:
            log.critical("the engine has failed, so the server stops with exit status 1")
            self.should_exit, self.status = True, 1
            exit_after(EXIT_S, self.status)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(DRAIN_S, self._service.stop)
        await super().shutdown(sockets)


def run(service: Service, listener: socket.socket, tls: TlsConfig | None = None, log_format: str = "text") -> int:
    """Serves until SIGINT or SIGTERM, and gives running requests DRAIN_S to finish.

    Returns:
      The exit status: 0, or 1 if the engine has failed.
    """
    logs.configure(log_format)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()  # else a collection would scan the start's objects again and stall all streams for 0.2 s
    server = Server(service, tls)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises the signal again once it has stopped
        pass
    finally:
        service.close()
    print("stopped", file=sys.stderr)
    return server.status


def socket_url(listener: socket.socket, scheme: str = "http") -> str:
    """Returns a listening socket's address as a URL."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
