"""Bounds on what all requests hold together: bytes, or places."""

import asyncio
import threading
from collections import deque

from serve.engine.engine_client import EngineFull

UNCOUNTED_BYTES = 2**16  # of each request, so that requests of text are never refused for others' images


class Budget:
    """An amount that requests share. Waiting requests are served in the order of their arrival.

    One request may exceed the whole amount while no other holds any of it, so that every request is served in
    the end. Event loops and threads may share a budget; `asyncio.Semaphore` belongs to one loop.

    Args:
      limit: the amount.
    """

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, asyncio.Future, asyncio.AbstractEventLoop]] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests that wait in `acquire`."""
        return len(self._waiting)

    def try_acquire(self, amount: int) -> bool:
        """Takes an amount if it is free and no request waits; returns whether it was."""
        with self._lock:
            if self._waiting or not self._fits(amount):
                return False
            self.used += amount
            return True

    async def acquire(self, amount: int) -> None:
        """Takes an amount, after waiting until it is free."""
        if self.try_acquire(amount):
            return
        loop = asyncio.get_running_loop()
        entry = amount, loop.create_future(), loop
        with self._lock:
            self._waiting.append(entry)
        self._grant()
        try:
            await entry[1]
        except asyncio.CancelledError:
            with self._lock:
                granted = entry not in self._waiting
                if not granted:
                    self._waiting.remove(entry)
            if granted:
                self.release(amount)
            else:
                self._grant()  # a smaller request behind it may fit
            raise

    def release(self, amount: int) -> None:
        """Gives back an amount."""
        with self._lock:
            self.used -= amount
            assert self.used >= 0, f"{amount} given back, {self.used + amount} taken"
        self._grant()

    def _grant(self) -> None:
        """Gives the amount to waiting requests, the first in line first."""
        with self._lock:
            while self._waiting and self._fits(self._waiting[0][0]):
                amount, future, loop = self._waiting.popleft()
                self.used += amount
                try:
                    loop.call_soon_threadsafe(_resolve, future)
                except RuntimeError:  # its loop has closed
                    self.used -= amount

    def _fits(self, amount: int) -> bool:
        return not self.used or self.used + amount <= self.limit


class RequestMemory:
    """Host memory that one request holds. `close` it.

    Args:
      sources: bytes of bodies and downloads, which requests hold until they are prepared.
      pixels: bytes of decoded images, which requests hold until they end.
    """

    def __init__(self, sources: Budget, pixels: Budget):
        self._sources, self._pixels = sources, pixels
        self._source_bytes = self._pixel_bytes = 0
        self._uncounted = UNCOUNTED_BYTES

    def hold_source(self, size: int) -> None:
        """Counts a part of the body or of a download. Raises EngineFull if all requests hold too much."""
        self._uncounted -= size
        new, self._uncounted = max(-self._uncounted, 0), max(self._uncounted, 0)
        if new and not self._sources.try_acquire(new):
            limit, used = self._sources.limit, self._sources.used
            raise EngineFull(f"bodies and downloads of all requests hold {used} bytes, and {limit} are allowed")
        self._source_bytes += new

    def drop_sources(self) -> None:
        """Gives back the bytes of body and downloads."""
        self._sources.release(self._source_bytes)
        self._source_bytes = 0

    async def hold_pixels(self, size: int) -> None:
        """Counts decoded images, after waiting until there is room for them."""
        await self._pixels.acquire(size)
        self._pixel_bytes += size

    def close(self) -> None:
        """Gives everything back."""
        self.drop_sources()
        self._pixels.release(self._pixel_bytes)
        self._pixel_bytes = 0


def _resolve(future: asyncio.Future) -> None:
    if not future.done():  # cancelled at the same moment; `acquire` gives the amount back
        future.set_result(None)
