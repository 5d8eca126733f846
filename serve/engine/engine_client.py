"""Requests on their way between asyncio tasks and a thread that answers them. Life of a request, and all that HTTP knows of it:

    job = engine.reserve()                 # a place, or EngineFull
    try:
        job.submit(inputs, options)        # prepared elsewhere, while others run
        async for delta in job.deltas():   # what has come since the last look, joined
            ...
    finally:
        job.close()                        # also stops an answer that nobody reads

A place is held from `reserve` until the answer has ended or, before it was submitted, until `close`: so the number of requests
that are being prepared, wait or run is bounded, whatever their readers do. What a slow reader has not fetched is kept: at most
its answer.
"""

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterable

from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.library import Delta
from minicpmv46_jax.processing import Inputs


class EngineFull(Exception):
    """Every place is taken, or the wait was too long; worth trying again later."""


class RequestRejected(ValueError):
    """The engine cannot serve this request, however long it waits; the message says why."""


class Cancelled(Exception):
    """The job was cancelled before its answer had ended."""


class EngineStopped(Exception):
    """The engine was stopped before the answer had ended, or begun."""

    def __init__(self):
        super().__init__("the server is shutting down")


class EngineClient:
    """Places, and a thread that works: subclasses say how. `close` it, or use it as a context manager.

    Args:
      capacity: requests that may be prepared, wait or run at once.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.num_reserved = 0  # places held
        self.stopping = False
        self.changed = threading.Condition()  # guards all of this; notified of news for the thread
        self._thread = threading.Thread(target=self.work, name="engine", daemon=True)

    def __enter__(self) -> "EngineClient":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether requests are still being worked on."""
        return self._thread.is_alive() and not self.stopping

    @property
    def full(self) -> bool:
        """Whether `reserve` would say so."""
        return self.num_reserved == self.capacity

    def reserve(self) -> "RequestHandle":
        """A place for a request of the calling event loop. Raises EngineFull or EngineStopped."""
        with self.changed:
            if self.stopping:
                raise EngineStopped
            if self.num_reserved == self.capacity:
                raise EngineFull(f"{self.capacity} requests are being worked on or wait, and no more may")
            self.num_reserved += 1
        return RequestHandle(self, asyncio.get_running_loop())

    def start(self) -> None:
        """Has the thread begin."""
        self._thread.start()

    def stop(self) -> None:
        """Ends all answers with EngineStopped at the thread's next step. Does not wait for it."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops, and waits for the thread to end: as long as a step takes, at most `timeout_s`."""
        self.stop()
        self._thread.join(timeout_s)

    def finish_request(self, job: "RequestHandle", outcome: "Delta | Exception") -> None:
        """Ends a submitted job. Its place is free first: who has read the end of an answer may ask again."""
        with self.changed:
            self.num_reserved -= 1
        job.finish(outcome)

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its answer may have."""
        raise NotImplementedError

    def work(self) -> None:
        """The thread's."""
        raise NotImplementedError

    def add_request(self, job: "RequestHandle", inputs: Inputs, options: GenerationOptions) -> None:
        """Takes a submitted job over, or raises; from now on the thread gives its place back."""
        raise NotImplementedError

    def abort_request(self, job: "RequestHandle") -> None:
        """A submitted job that nobody waits for any more."""
        raise NotImplementedError


class RequestHandle:
    """A request on its way through an engine, made by `EngineClient.reserve`. Methods without a note belong to the event loop."""

    def __init__(self, desk: EngineClient, loop: asyncio.AbstractEventLoop):
        self.submitted = self.cancelled = False
        self.reserved_at = time.monotonic()
        self.loop = loop
        self._desk = desk
        self._closed = False
        self._lock = threading.Lock()  # guards the two below
        self._pending: list[Delta] = []
        self._outcome: Delta | Exception | None = None
        self._news = asyncio.Event()

    def submit(self, inputs: Inputs, options: GenerationOptions) -> None:
        """Joins the queue.

        Raises:
          Cancelled: nobody waits for the answer any more.
          Refused: it cannot be served.
          EngineStopped: nothing is any more.
        """
        if self.cancelled:
            raise Cancelled
        self._desk.add_request(self, inputs, options)
        self.submitted = True  # only now: who is refused closes, and that gives the place back

    async def deltas(self) -> AsyncIterator[Delta]:
        """The answer as it comes; the last one has a finish_reason.

        Raises:
          Cancelled, EngineStopped: see `cancel` and `EngineClient.stop`.
          EngineFull: it has waited too long to begin.
          Exception: whatever the model raised.
        """
        outcome = None
        while outcome is None:
            await self._news.wait()
            self._news.clear()
            if self.cancelled:
                raise Cancelled
            with self._lock:
                pending, self._pending = self._pending, []
                outcome = self._outcome
            if isinstance(outcome, Delta):
                pending.append(outcome)
            if pending:
                yield joined(pending)
            if isinstance(outcome, Exception):
                raise outcome

    def cancel(self) -> None:
        """Ends `deltas` with Cancelled, now and later; the model stops at its next step."""
        if not self.cancelled:
            self.cancelled = True
            self._news.set()
            if self.submitted:
                self._desk.abort_request(self)

    def close(self) -> None:
        """Cancels, and gives back a place that the thread does not hold. Once or more often."""
        if not self._closed:
            self._closed = True
            self.cancel()
            if not self.submitted:
                with self._desk.changed:
                    self._desk.num_reserved -= 1

    def deliver(self, delta: Delta) -> bool:
        """The thread's: a step of the answer. Whether the reader is to be told; else it was and has not looked yet."""
        with self._lock:
            self._pending.append(delta)
            return len(self._pending) == 1

    def finish(self, outcome: Delta | Exception) -> None:
        """The thread's: the answer's end, and the last call."""
        with self._lock:
            self._outcome = outcome
        notify_readers([self])

    def look(self) -> None:
        """There is news."""
        self._news.set()


def notify_readers(jobs: Iterable[RequestHandle]) -> None:
    """Has readers look, from another thread: one call for all of a loop, each costs it a system call."""
    loops: dict[asyncio.AbstractEventLoop, list[RequestHandle]] = {}
    for job in jobs:
        loops.setdefault(job.loop, []).append(job)
    for loop, theirs in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody reads
            loop.call_soon_threadsafe(_look, theirs)


def _look(jobs: list[RequestHandle]) -> None:
    for job in jobs:
        job.look()


def joined(deltas: list[Delta]) -> Delta:
    """Consecutive steps as one."""
    text = "".join(delta.text for delta in deltas)
    tokens = tuple(itertools.chain.from_iterable(delta.tokens for delta in deltas))
    return Delta(text, tokens, deltas[-1].finish_reason)
