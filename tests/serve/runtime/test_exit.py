"""The server's process ends after a signal and after the engine's failure, whatever is under way."""

import signal
import subprocess
import sys
import time

import pytest

from tests import ROOT

SCRIPT = """
import asyncio, signal, socket, sys, threading, time
from serve.runtime import server
from serve.runtime.exit_watchdog import GRACE_S, exit_after
from tests.serve.support import FakeModel, serving

server.DRAIN_S, server.DISCONNECT_S, server.EXIT_S = {times}
signal.signal(signal.SIGTERM, signal.default_int_handler)  # as serve.__main__
kind = sys.argv[1]
with serving(FakeModel()) as service, socket.create_server(("127.0.0.1", 0)) as listener:
    startup = server.Server.startup

    async def start(self, sockets=None):
        if kind == "resolver":  # asyncio resolves names in the loop's default executor
            asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
        if kind == "engine":
            service.engine.failed = RuntimeError("broken")
        await startup(self, sockets)

    async def shutdown(self, sockets=None):
        print("stopping", flush=True)
        await asyncio.sleep(60)

    server.Server.startup = start
    if kind == "twice":
        server.Server.shutdown = shutdown
    if kind == "thread":
        threading.Thread(target=time.sleep, args=(60,)).start()
    status = server.run(service, listener)
    exit_after(GRACE_S, status)
    sys.exit(status)
"""


@pytest.mark.parametrize(
    "kind, times, status, words",
    [
        ("thread", "1, 2, 3", 0, "did not end within 3 seconds"),  # a thread of a pool, which the interpreter joins
        ("resolver", "1, 2, 3", 0, "did not end within 3 seconds"),
        ("twice", "20, 22, 25", 128 + signal.SIGTERM, ""),
        ("engine", "20, 22, 25", 1, "the engine has failed, so the server stops"),
    ],
)
def test_the_process_ends(kind, times, status, words):
    script = SCRIPT.replace("{times}", times)
    command = [sys.executable, "-c", script, kind]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline().startswith("ready")
        begun = time.monotonic()
        if kind != "engine":
            server.send_signal(signal.SIGTERM)
        if kind == "twice":
            assert server.stdout.readline() == "stopping\n"
            server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=50)
    assert server.returncode == status, log
    assert words in log
    assert time.monotonic() - begun < 20
