"""From a service and a socket to answers, until a signal."""

import asyncio
import logging
import socket
import sys

import uvicorn

from serve.api import Service, create_app

DRAIN_S = 20  # what a stopping server gives the answers under way; a second Ctrl-C gives them none
CUT_OFF_S = 25  # after which clients that do not read are cut off


class Server(uvicorn.Server):
    """Says when it takes connections; once stopped, ends what lasts longer than DRAIN_S in words instead of cutting it off."""

    def __init__(self, service: Service):
        self._service = service
        super().__init__(
            uvicorn.Config(create_app(service), log_config=None, access_log=False, timeout_graceful_shutdown=CUT_OFF_S)
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            print(f'ready: {address(listening)}/v1 serves "{self._service.name}"', flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(DRAIN_S, self._service.engine.stop)
        await super().shutdown(sockets)


def run(service: Service, listening: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM; gives the answers under way a moment to end."""
    configure_log()
    try:
        Server(service).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn, once stopped, raises the signal anew
        pass
    finally:
        service.close()
    print("stopped", file=sys.stderr)


def address(listening: socket.socket) -> str:
    """A socket's, as a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def configure_log() -> None:
    """Our lines and uvicorn's, on stderr; apart from the root logger, which libraries set up as they please."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
