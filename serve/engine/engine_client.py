"""Interface between asyncio tasks and an engine's thread. The HTTP layer uses an engine like this:

    handle = engine.reserve()                # takes capacity, or raises EngineFull
    try:
        handle.submit(inputs, options)       # prepared in a thread pool, while other requests run
        async for delta in handle.deltas():  # all output since the last iteration, joined
            ...
    finally:
        handle.close()                       # also cancels an output that is not read to its end

Capacity is held from `reserve` until the request has finished or, before it was submitted, until `close`.
This bounds the number of requests that are prepared, waiting or running, even if clients read slowly. Deltas
that a client has not read are buffered, at most one output per request.

Every submitted request finishes, whatever fails. An error that `run` cannot handle ends the engine for good:
all requests, and later ones, get EngineFailed.
"""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable

from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.library import Delta
from minicpmv46_jax.processing import Inputs

log = logging.getLogger("serve")


class EngineFull(Exception):
    """The capacity is used up, or the request has waited too long; a later retry may succeed."""


class RequestRejected(ValueError):
    """The engine can never serve this request; the message gives the reason."""


class Cancelled(Exception):
    """The request was cancelled before its output was complete."""


class EngineStopped(Exception):
    """The engine was stopped before the output was complete."""

    message = "the server is shutting down"
    code = "shutting_down"

    def __init__(self):
        super().__init__(self.message)


class EngineFailed(EngineStopped):
    """The engine has ended because of an error, before the output was complete."""

    message = "the engine has failed; the server must be restarted"
    code = "engine_failed"


class EngineClient:
    """Capacity, and a thread that runs requests as subclasses define.

    `close` it, or use it as a context manager.

    Args:
      capacity: requests that may be prepared, waiting or running at once.

    Attributes:
      failed: the error that ended the engine for good; None while there is none.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.stopping = False
        self.failed: BaseException | None = None
        self.changed = threading.Condition()  # guards all fields; notified when the thread has something to do
        self._reserved: set[RequestHandle] = set()
        self._failure_callbacks: list[Callable[[BaseException], None]] = []
        self._thread = threading.Thread(target=self._run_and_finish, name="engine", daemon=True)

    def __enter__(self) -> "EngineClient":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """True while requests are served."""
        return self._thread.is_alive() and not self.stopping

    @property
    def num_reserved(self) -> int:
        """Number of requests that hold capacity."""
        return len(self._reserved)

    @property
    def full(self) -> bool:
        """True if `reserve` would raise EngineFull."""
        return self.num_reserved == self.capacity

    def reserve(self) -> "RequestHandle":
        """Reserves capacity for a request of the running event loop. Raises EngineFull or EngineStopped."""
        handle = RequestHandle(self, asyncio.get_running_loop())
        with self.changed:
            if self.stopping:
                raise self.stopped_error()
            if self.full:
                raise EngineFull(f"{self.capacity} requests are being worked on or wait, and no more may")
            self._reserved.add(handle)
        return handle

    def stopped_error(self) -> EngineStopped:
        """Returns the error of a request that a stopping engine gives up."""
        return EngineStopped() if self.failed is None else EngineFailed()

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        """Registers a function that is called with `failed`, in the engine's thread.

        It is called at once if the engine has failed already.
        """
        with self.changed:
            if self.failed is None:
                self._failure_callbacks.append(callback)
                return
        callback(self.failed)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finishes all requests with EngineStopped at the thread's next step. Does not wait for it."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops, and waits for the thread to end: about as long as a step takes, at most `timeout_s`."""
        self.stop()
        self._thread.join(timeout_s)

    def finish_request(self, handle: "RequestHandle", outcome: Delta | BaseException) -> None:
        """Finishes a submitted request; has no effect the second time.

        Frees the request's capacity before delivering the final delta, so a client may send its next request
        at once.
        """
        if self.free_capacity(handle):
            handle.finish(outcome)

    def free_capacity(self, handle: "RequestHandle") -> bool:
        """Frees a request's capacity; returns False if it was freed before."""
        with self.changed:
            held = handle in self._reserved
            self._reserved.discard(handle)
        return held

    def _run_and_finish(self) -> None:
        """Runs the engine in its thread, and finishes all requests when it ends."""
        try:
            self.run()
        except BaseException as error:
            self._fail(error)
        with self.changed:
            self.stopping = True
            submitted = [handle for handle in self._reserved if handle.submitted]
        for handle in submitted:
            self.finish_request(handle, self.stopped_error())

    def _fail(self, error: BaseException) -> None:
        log.critical("the engine has failed; no request can be served any more", exc_info=error)
        with self.changed:
            self.failed, self.stopping = error, True
            callbacks = self._failure_callbacks
        for callback in callbacks:
            try:
                callback(error)
            except Exception:
                log.exception("a callback of the engine's failure failed")

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its output may have."""
        raise NotImplementedError

    def run(self) -> None:
        """Runs requests until the engine stops; called in the thread."""
        raise NotImplementedError

    def add_request(self, handle: "RequestHandle", inputs: Inputs, options: GenerationOptions, cache_salt: str) -> None:
        """Takes over a submitted request and its capacity, or raises."""
        raise NotImplementedError

    def abort_request(self, handle: "RequestHandle") -> None:
        """Aborts a submitted request whose client is gone."""
        raise NotImplementedError


class RequestHandle:
    """The client side's handle of a request, made by `EngineClient.reserve`.

    Methods belong to the event loop unless their docstring names the engine's thread.
    """

    def __init__(self, engine: EngineClient, loop: asyncio.AbstractEventLoop):
        self.submitted = self.cancelled = False
        self.reserved_at = time.monotonic()
        self.loop = loop
        self._engine = engine
        self._closed = False
        self._lock = threading.Lock()  # guards `_pending` and `_outcome`
        self._pending: list[Delta] = []
        self._outcome: Delta | Exception | None = None
        self._updated = asyncio.Event()

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its output may have."""
        return self._engine.max_model_len

    def submit(self, inputs: Inputs, options: GenerationOptions, cache_salt: str = "") -> None:
        """Adds the request to the engine's queue.

        Args:
          inputs: the prompt.
          options: of generation.
          cache_salt: cached prefixes and images are shared only among requests with the same salt.

        Raises:
          Cancelled: `cancel` was called before.
          RequestRejected: the engine can never serve it.
          EngineStopped: the engine has stopped.
        """
        if self.cancelled:
            raise Cancelled
        self.submitted = True  # before the call, because the engine may finish the request, or end, during it
        try:
            self._engine.add_request(self, inputs, options, cache_salt)
        except BaseException:
            self.submitted = False  # `close` frees the capacity
            raise

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yields the output as it arrives; the last delta has a finish_reason.

        Raises:
          Cancelled, EngineStopped: see `cancel` and `EngineClient.stop`.
          EngineFull: the request expired before it started.
          Exception: any error of the model.
        """
        outcome = None
        while outcome is None:
            await self._updated.wait()
            self._updated.clear()
            if self.cancelled:
                raise Cancelled
            with self._lock:
                pending, self._pending = self._pending, []
                outcome = self._outcome
            if isinstance(outcome, Delta):
                pending.append(outcome)
            if pending:
                yield join_deltas(pending)
            if isinstance(outcome, Exception):
                raise outcome

    def cancel(self) -> None:
        """Makes `deltas` raise Cancelled from now on; the engine stops the request at its next step."""
        if not self.cancelled:
            self.cancelled = True
            self._updated.set()
            if self.submitted:
                self._engine.abort_request(self)

    def close(self) -> None:
        """Cancels, and frees the capacity of a request that was not submitted.

        Has no effect the second time.
        """
        if not self._closed:
            self._closed = True
            self.cancel()
            if not self.submitted:
                self._engine.free_capacity(self)

    def deliver(self, delta: Delta) -> bool:
        """Buffers a delta; called in the engine's thread.

        Returns True if the reader must be woken, False if a wake-up is already pending.
        """
        with self._lock:
            self._pending.append(delta)
            return len(self._pending) == 1

    def finish(self, outcome: Delta | BaseException) -> None:
        """Sets the final delta or the error and wakes the reader; the engine thread's last call.

        An error that is no Exception, such as a panic of a Rust library, is raised as RuntimeError, because
        servers take it for a request to exit.
        """
        if not isinstance(outcome, Delta | Exception):
            cause, outcome = outcome, RuntimeError(f"{type(outcome).__name__}: {outcome}")
            outcome.__cause__ = cause
        with self._lock:
            self._outcome = outcome
        notify_readers([self])

    def wake(self) -> None:
        """Wakes `deltas`."""
        self._updated.set()


def notify_readers(handles: Iterable[RequestHandle]) -> None:
    """Wakes readers from another thread, with one call per event loop, because each costs a system call."""
    loops: dict[asyncio.AbstractEventLoop, list[RequestHandle]] = {}
    for handle in handles:
        loops.setdefault(handle.loop, []).append(handle)
    for loop, group in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(_wake_all, group)


def _wake_all(handles: list[RequestHandle]) -> None:
    for handle in handles:
        handle.wake()


def join_deltas(deltas: list[Delta]) -> Delta:
    """Joins consecutive deltas into one."""
    text = "".join(delta.text for delta in deltas)
    tokens = tuple(itertools.chain.from_iterable(delta.tokens for delta in deltas))
    return Delta(text, tokens, deltas[-1].finish_reason)
