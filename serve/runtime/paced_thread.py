"""A thread for work that holds Python's lock, with a bound on its share of the time.

Checks of large bodies hold the lock for milliseconds to a tenth of a second each. While they do, neither the
engine's thread nor the event loop runs. Hostile bodies in a loop would leave them almost nothing.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

SHARE = 0.2  # of the elapsed time
MAX_REST_S = 2.0


class PacedThread:
    """Runs functions one after another, and rests between them. `close` it.

    After a function that took some processor time, the next one begins late enough that functions take SHARE
    of the time. A result is never delayed by its own rest.
    """

    def __init__(self, name: str):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._rest_until = 0.0

    async def run(self, function: Callable[..., T], *args) -> T:
        """Returns the function's result."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, function, args)

    def _run(self, function: Callable[..., T], args: tuple) -> T:
        time.sleep(max(self._rest_until - time.monotonic(), 0.0))
        begun = time.thread_time()
        try:
            return function(*args)
        finally:
            rest = (time.thread_time() - begun) * (1 / SHARE - 1)
            self._rest_until = time.monotonic() + min(rest, MAX_REST_S)

    def close(self) -> None:
        """Drops functions that have not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)
