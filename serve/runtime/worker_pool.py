"""Worker processes for work on what clients send, with bounds on processor time, elapsed time and memory.

A worker process runs one job at a time. A job that crashes, exceeds a bound or is cancelled ends its own
process, which is replaced; no other job notices. `concurrent.futures.ProcessPoolExecutor` fails all jobs when
one process dies, and cannot stop a running job.

The kernel enforces the processor time (RLIMIT_CPU) and the memory (RLIMIT_DATA), so that C code
is bounded too; Windows has neither. Workers run at a lower priority than the server (nice).
"""

import asyncio
import contextlib
import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

if sys.platform != "win32":
    import resource

T = TypeVar("T")

PIPE_BYTES = 2**15  # a shorter message never waits: a pipe holds 64 KiB, and a process has one call at a time
NICENESS = 5  # the engine's thread and the event loop come first
_starting = threading.Lock()  # `multiprocessing` starts one process at a time


class WorkerFailed(Exception):
    """A job ended its worker process; the message is the reason as the end of a sentence."""


class WorkerTimeout(WorkerFailed):
    """A job exceeded its processor time or its elapsed time."""


class WorkerCrashed(WorkerFailed):
    """A job's process ended by itself, or was killed from outside."""


class Call:
    """Calls functions in one worker process; a job receives it.

    Args:
      worker: runs the calls.
      job: the job that calls.
    """

    def __init__(self, worker: "_Worker", job: "Job"):
        self._worker, self._job = worker, job

    def __call__(self, function: Callable[..., T], *args: Any, cpu_s: float, timeout_s: float) -> T:
        """Runs a function in the worker process and returns its result.

        Args:
          function: a function of a module; it and its arguments are pickled.
          *args: its arguments.
          cpu_s: processor time of the call over all its threads; enforced in whole seconds.
          timeout_s: elapsed time of the call.

        Raises:
          WorkerTimeout: the call exceeded a bound.
          WorkerCrashed: the process ended.
          Exception: any exception of the function; MemoryError beyond the pool's memory.
        """
        return self._worker.call(self._job, function, args, cpu_s, timeout_s)


class Job(Generic[T]):
    """A submitted job. `future` has its result."""

    def __init__(self, run: Callable[[Call], T]):
        self.future: Future[T] = Future()
        self.run = run
        self.cancelled = False
        self.worker: _Worker | None = None

    def cancel(self) -> None:
        """Drops the job; if it runs, its process is killed. Has no effect once it has ended."""
        self.cancelled = True
        self.future.cancel()
        if (worker := self.worker) is not None:
            worker.kill(self)


class WorkerPool:
    """A fixed number of worker processes and a queue of jobs. `close` it.

    The processes start at once. One that has ended is replaced before its next job.

    Args:
      num_workers: number of processes.
      name: of the threads that wait for them.
      memory_bytes: memory that a process may allocate beyond that of its start; not enforced on macOS.
      initializer: called in each new process.
      *initargs: its arguments.
    """

    def __init__(
        self, num_workers: int, name: str, memory_bytes: int, initializer: Callable[..., None] | None = None, *initargs: Any
    ):
        self.num_workers = num_workers
        self.setup = (memory_bytes, initializer, initargs)
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._workers = [_Worker(self, f"{name}-{i}") for i in range(num_workers)]

    def submit(self, run: Callable[[Call], T]) -> Job[T]:
        """Queues a job: `run` is called in a thread of its worker process, with the process's `Call`."""
        job = Job(run)
        self.jobs.put(job)
        return job

    async def run(self, run: Callable[[Call], T]) -> T:
        """Runs a job and returns its result. If the caller is cancelled, the job is too."""
        job = self.submit(run)
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            job.cancel()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [worker.process.pid for worker in self._workers if worker.process is not None and worker.process.pid]

    def close(self) -> None:
        """Kills the processes; their jobs fail, and jobs in the queue are cancelled. Does not wait."""
        with contextlib.suppress(queue.Empty):
            while True:
                if (job := self.jobs.get_nowait()) is not None:
                    job.future.cancel()
        for worker in self._workers:
            self.jobs.put(None)
            worker.close()


class _Worker:
    """One process, and the daemon thread that runs jobs in it."""

    def __init__(self, pool: WorkerPool, name: str):
        self._pool = pool
        self._closed = False
        self._lock = threading.Lock()  # guards `_current`, `_reason` and kills
        self._current: Job | None = None  # the job whose call runs in the process
        self._reason = ""
        self.process: Any = None
        self._connection: Connection | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        if hasattr(signal, "pthread_sigmask"):  # processes inherit it: Ctrl-C is for the server
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._start_process()
        while (job := self._pool.jobs.get()) is not None:
            job.worker = self
            if job.cancelled or not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(job.run(Call(self, job)))
            except BaseException as error:  # any error is the job's; the thread goes on
                job.future.set_exception(error)
            del job  # its data may be large, and the next one may be long in coming

    def _start_process(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        with _starting:
            if self._closed:
                return
            connection, child = spawn.Pipe()
            process = spawn.Process(target=_main, args=(child, *self._pool.setup), daemon=True)
            process.start()
            child.close()  # so that the end of the process ends `recv`
        with self._lock:
            self.process, self._connection = process, connection
            if self._closed:  # meanwhile
                process.kill()

    def call(self, job: Job, function: Callable[..., T], args: tuple, cpu_s: float, timeout_s: float) -> T:
        """Runs `Call.__call__`."""
        # Not `is_alive`: another thread that starts a process may be reaping this one.
        if self.process is not None and wait([self.process.sentinel], 0):
            self._forget_process()
        if self._connection is None:
            self._start_process()
        with self._lock:
            self._current, self._reason = job, ""
            if job.cancelled or self._connection is None:
                self._current = None
                raise WorkerTimeout("was cancelled")
        reason = f"took longer than {timeout_s:g} seconds"
        begun = time.monotonic()
        try:
            self._send(job, bytes(ForkingPickler.dumps((function, args, cpu_s))), timeout_s, reason)
            if not self._connection.poll(max(begun + timeout_s - time.monotonic(), 0)):
                self.kill(job, reason)
            succeeded, result = self._connection.recv()
        except (EOFError, OSError):
            raise self._failure(cpu_s) from None
        finally:
            with self._lock:
                self._current = None
        if succeeded:
            return result
        raise result

    def _send(self, job: Job, message: bytes, timeout_s: float, reason: str) -> None:
        """Sends a message. A long one fills the pipe and waits for the process, which may be stopped."""
        assert self._connection is not None
        if len(message) < PIPE_BYTES:
            self._connection.send_bytes(message)
            return
        timer = threading.Timer(timeout_s, self.kill, (job, reason))
        timer.daemon = True
        timer.start()
        try:
            self._connection.send_bytes(message)
        finally:
            timer.cancel()

    def _failure(self, cpu_s: float) -> WorkerFailed:
        """Returns the error of a call whose process has ended, and forgets the process."""
        code = self._forget_process()
        if self._reason:
            return WorkerTimeout(self._reason)
        if code is not None and -code == getattr(signal, "SIGXCPU", None):
            return WorkerTimeout(f"took more than {cpu_s:g} seconds of processor time")
        return WorkerCrashed(f"ended its process ({_exit_name(code)})")

    def _forget_process(self) -> int | None:
        """Makes sure that the process has ended, and returns its exit code."""
        process, self.process = self.process, None
        assert process is not None and self._connection is not None
        self._connection.close()
        self._connection = None
        process.join(1)
        process.kill()  # it may have closed its connection and live on
        process.join()
        return process.exitcode

    def kill(self, job: Job, reason: str = "was cancelled") -> None:
        """Kills the process if it runs a call of this job."""
        with self._lock:
            if self._current is job and self.process is not None:
                self._reason = reason
                self.process.kill()

    def close(self) -> None:
        """Kills the process."""
        with self._lock:
            self._closed = True
            if self.process is not None:
                self._reason = "was cancelled"
                self.process.kill()


def _exit_name(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit status {code}"


def _main(connection: Connection, memory_bytes: int, initializer: Callable[..., None] | None, initargs: tuple) -> None:
    """Runs calls in the worker process until the server closes the connection or ends."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if sys.platform != "win32":
        os.nice(NICENESS)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if initializer is not None:
        initializer(*initargs)
    _limit_memory(memory_bytes)
    while True:
        try:
            function, args, cpu_s = connection.recv()
        except EOFError:
            return
        _limit_processor_time(cpu_s)
        try:
            answer = True, function(*args)
        except Exception as error:
            answer = False, error
        try:
            connection.send(answer)
        except (AttributeError, TypeError, ValueError) as error:  # the result cannot be pickled
            connection.send((False, RuntimeError(f"{type(answer[1]).__name__} cannot be sent: {error}")))
        del function, args, answer


def _limit_processor_time(cpu_s: float) -> None:
    if sys.platform == "win32":
        return
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + cpu_s), hard))


def _limit_memory(memory_bytes: int) -> None:
    if sys.platform != "linux":
        return
    with open("/proc/self/status") as file:
        used = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _exit_with_parent() -> None:
    """Ends the process with the server, even if the server is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # None only in the server itself
    parent.join()
    os._exit(1)
