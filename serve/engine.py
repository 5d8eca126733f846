"""Requests through the model, one at a time and in the order they were submitted.

A worker thread runs the model; asyncio tasks read what it says. Life of a request, and all that HTTP knows of an engine:

    job = engine.reserve()                 # a place, or EngineFull
    try:
        job.submit(inputs, options)        # prepared elsewhere, while others run
        async for delta in job.deltas():   # what has come since the last look, joined
            ...
    finally:
        job.close()                        # also stops an answer that nobody reads

A place is held from `reserve` until the answer has ended or, before it began, until `close`: so the number of requests that are
being prepared, wait or run is bounded, whatever their readers do. What a slow reader has not fetched is kept: at most its answer.
"""

import asyncio
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

from minicpmv46_jax.library import Delta
from minicpmv46_jax.options import GenerationOptions
from minicpmv46_jax.processing import Inputs

MAX_WAITING = 64  # requests that may wait for the one that runs


class Model(Protocol):
    """What the engine needs of `minicpmv46_jax.MiniCPMV`."""

    def generate(self, inputs: Inputs, options: GenerationOptions) -> Iterator[Delta]: ...


class EngineFull(Exception):
    """Every place is taken; worth trying again later."""


class Cancelled(Exception):
    """The job was cancelled before its answer had ended."""


class EngineStopped(Exception):
    """The engine was stopped before the answer had ended, or begun."""

    def __init__(self):
        super().__init__("the server is shutting down")


class Engine:
    """A worker thread over one model. `close` it, or use it as a context manager."""

    def __init__(self, model: Model, max_waiting: int = MAX_WAITING):
        self._model = model
        self._places = max_waiting + 1
        self._taken = 0
        self._waiting: deque[Job] = deque()
        self._stopping = False
        self._changed = threading.Condition()  # guards everything above
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether requests are still being worked on."""
        return self._thread.is_alive() and not self._stopping

    @property
    def taken(self) -> int:
        """Places held: requests being prepared, waiting or running."""
        return self._taken

    @property
    def full(self) -> bool:
        """Whether `reserve` would say so."""
        return self._taken == self._places

    def reserve(self) -> "Job":
        """A place for a request of the calling event loop. Raises EngineFull or EngineStopped."""
        with self._changed:
            if self._stopping:
                raise EngineStopped
            if self._taken == self._places:
                raise EngineFull(f"{self._places} requests are being worked on or wait, and no more may")
            self._taken += 1
        return Job(self, asyncio.get_running_loop())

    def stop(self) -> None:
        """Ends the running answer at its next step and the waiting ones now, all with EngineStopped. Does not wait for it."""
        with self._changed:
            self._stopping = True
            for job in self._waiting:
                job.finish(EngineStopped())
            self._changed.notify_all()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops, and waits for the thread to end: as long as a step takes, at most `timeout_s`."""
        self.stop()
        self._thread.join(timeout_s)

    def enqueue(self, job: "Job") -> None:
        """For `Job.submit`."""
        with self._changed:
            if self._stopping:
                raise EngineStopped
            job.submitted = True
            self._waiting.append(job)
            self._changed.notify_all()

    def withdraw(self, job: "Job") -> None:
        """For `Job.close`: frees the place of a job that does not run; one that runs keeps its own until the worker lets go."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._taken -= 1
            elif not job.submitted:
                self._taken -= 1

    def _work(self) -> None:
        while (job := self._next()) is not None:
            outcome = self._answer(job)
            with self._changed:
                self._taken -= 1
            job.finish(outcome)  # after the place is free: who has read the end of an answer may ask again

    def _next(self) -> "Job | None":
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            return None if self._stopping else self._waiting.popleft()

    def _answer(self, job: "Job") -> Delta | Exception:
        """Runs a job; returns its last delta, or why there is none."""
        try:
            with contextlib.closing(self._model.generate(*job.take())) as deltas:
                for delta in deltas:
                    if job.cancelled or self._stopping:
                        return EngineStopped() if self._stopping else Cancelled()
                    if delta.finish_reason is not None:
                        return delta
                    job.deliver(delta)
            raise RuntimeError("the model's answer ended without a finish_reason")
        except Exception as error:  # whatever it is, it is this request's alone and the next one must run
            return error


class Job:
    """One request's way through an engine. Made by `Engine.reserve`; its methods without a note belong to the event loop."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop):
        self.submitted = self.cancelled = False
        self._engine, self._loop = engine, loop
        self._work: tuple[Inputs, GenerationOptions] | None = None
        self._closed = False
        self._lock = threading.Lock()  # guards the two below
        self._pending: list[Delta] = []
        self._outcome: Delta | Exception | None = None
        self._news = asyncio.Event()

    def submit(self, inputs: Inputs, options: GenerationOptions) -> None:
        """Joins the queue. Raises Cancelled if nobody waits for the answer any more, or EngineStopped."""
        if self.cancelled:
            raise Cancelled
        self._work = (inputs, options)
        self.submitted = True
        self._engine.enqueue(self)

    async def deltas(self) -> AsyncIterator[Delta]:
        """The answer as it comes; the last one has a finish_reason.

        Raises:
          Cancelled, EngineStopped: see `cancel` and `Engine.stop`.
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
        self.cancelled = True
        self._news.set()

    def close(self) -> None:
        """Cancels, and gives back a place that the worker does not hold. Once or more often."""
        if not self._closed:
            self._closed = True
            self.cancel()
            self._engine.withdraw(self)

    def take(self) -> tuple[Inputs, GenerationOptions]:
        """The worker's: what to run, let go of here so that pictures do not outlive their use."""
        work, self._work = self._work, None
        assert work is not None
        return work

    def deliver(self, delta: Delta) -> None:
        """The worker's: a step of the answer."""
        with self._lock:
            self._pending.append(delta)
            first = len(self._pending) == 1
        if first:  # else the reader has been told and has not looked yet
            self._tell()

    def finish(self, outcome: Delta | Exception) -> None:
        """The worker's: the answer's end, and the last call."""
        with self._lock:
            self._outcome = outcome
        self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody reads
            self._loop.call_soon_threadsafe(self._news.set)


def joined(deltas: list[Delta]) -> Delta:
    """Consecutive steps as one."""
    text = "".join(delta.text for delta in deltas)
    tokens = tuple(itertools.chain.from_iterable(delta.tokens for delta in deltas))
    return Delta(text, tokens, deltas[-1].finish_reason)
