"""From a service and a socket to answers, until a signal."""

import asyncio
import dataclasses
import gc
import socket
import sys

import uvicorn

from serve.api import Service, create_app
from serve.runtime import logs

DRAIN_S = 20  # what a stopping server gives the answers under way; a second Ctrl-C gives them none
CUT_OFF_S = 25  # after which clients that do not read are cut off
KEEP_ALIVE_S = 75  # that an idle connection stays open: longer than clients keep theirs, or they send into one that closes
# The engine's thread asks for the GIL some ten times a step. At Python's 5 ms it waited longer for the loop's thread, which turns
# tokens into events, than its step took.
SWITCH_S = 0.0005


@dataclasses.dataclass(frozen=True)
class Tls:
    """A certificate and its key, as files in PEM form."""

    ssl_certfile: str
    ssl_keyfile: str | None = None
    ssl_keyfile_password: str | None = None


class Server(uvicorn.Server):
    """Says when it takes connections; once stopped, ends what lasts longer than DRAIN_S in words instead of cutting it off."""

    def __init__(self, service: Service, tls: Tls | None = None):
        self._service, self._scheme = service, "http" if tls is None else "https"
        super().__init__(
            uvicorn.Config(
                create_app(service),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=CUT_OFF_S,
                timeout_keep_alive=KEEP_ALIVE_S,
                **({} if tls is None else dataclasses.asdict(tls)),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            print(f'ready: {address(listening, self._scheme)}/v1 serves "{self._service.name}"', flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(DRAIN_S, self._service.engine.stop)
        await super().shutdown(sockets)


def run(service: Service, listening: socket.socket, tls: Tls | None = None, log_format: str = "text") -> None:
    """Serves until SIGINT or SIGTERM; gives the answers under way a moment to end."""
    logs.configure(log_format)
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()  # what the start has made: to look through it all again would take 0.2 s, in the middle of everybody's answers
    try:
        Server(service, tls).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn, once stopped, raises the signal anew
        pass
    finally:
        service.close()
    print("stopped", file=sys.stderr)


def address(listening: socket.socket, scheme: str = "http") -> str:
    """A socket's, as a URL."""
    host, port = listening.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
