"""Ends the process at a time that no stuck thread can delay.

The interpreter joins the threads of pools at its exit, and asyncio joins the threads that resolve names. So a
slow download or a stuck device would keep the process after a signal.
"""

import faulthandler
import logging
import os
import sys
import threading

GRACE_S = 3  # for the interpreter's own exit, once the server has stopped
FLUSH_S = 1
LAST_RESORT_S = 5  # later, if not even a Python thread can run

log = logging.getLogger("serve")


def exit_after(seconds: float, status: int) -> None:
    """Ends the process with an exit status after some time, unless it has ended by itself."""
    timer = threading.Timer(seconds, _expire, (seconds, status))
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + LAST_RESORT_S, exit=True, file=sys.__stderr__)


def exit_now(status: int) -> None:
    """Ends the process without joining threads, after flushing logs and output."""
    flush = threading.Thread(target=_flush, daemon=True)  # a stuck thread may hold a stream's lock
    flush.start()
    flush.join(FLUSH_S)
    os._exit(status)


def _expire(seconds: float, status: int) -> None:
    names = sorted(thread.name for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread())
    log.error("the process did not end within %g seconds; it is ended now, threads: %s", seconds, ", ".join(names) or "none")
    exit_now(status)


def _flush() -> None:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
