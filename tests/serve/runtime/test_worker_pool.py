"""Worker processes: results and errors come back, and a job that fails costs itself alone."""

import asyncio
import os
import signal
import threading
import time

import pytest

from serve.runtime.worker_pool import WorkerCrashed, WorkerPool, WorkerTimeout

BOUNDS = {"cpu_s": 20, "timeout_s": 60}
MIB = 2**20


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(2, "test", memory_bytes=256 * MIB)
    yield pool
    pool.close()


def call(pool, function, *args, **bounds):
    return pool.submit(lambda call: call(function, *args, **{**BOUNDS, **bounds})).future.result(60)


def fail(message):
    raise ValueError(message)


def spin():
    while True:
        pass


def allocate(size):
    return len(bytes(size))


def unpicklable():
    return threading.Lock()


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def test_results_and_errors_come_back(pool):
    assert call(pool, divmod, 7, 3) == (2, 1)
    with pytest.raises(ValueError, match="seven"):
        call(pool, fail, "seven")
    with pytest.raises(RuntimeError, match="lock cannot be sent"):
        call(pool, unpicklable)


def test_several_calls_of_a_job_run_in_one_process(pool):
    def job(call):
        return {call(os.getpid, **BOUNDS) for _ in range(5)}

    assert len(pool.submit(job).future.result(60)) == 1


def test_processor_time_is_bounded(pool):
    with pytest.raises(WorkerTimeout, match="more than 1 seconds of processor time"):
        call(pool, spin, cpu_s=1)


def test_elapsed_time_is_bounded(pool):
    with pytest.raises(WorkerTimeout, match=r"longer than 0\.2 seconds"):
        call(pool, time.sleep, 60, timeout_s=0.2)


def test_a_stopped_process_is_replaced_although_the_message_does_not_fit_its_pipe(pool):
    def job(call):
        os.kill(call(os.getpid, **BOUNDS), signal.SIGSTOP)
        call(len, bytes(MIB), cpu_s=1, timeout_s=0.2)

    with pytest.raises(WorkerTimeout, match=r"longer than 0\.2 seconds"):
        pool.submit(job).future.result(60)
    assert call(pool, len, b"12") == 2


def test_memory_is_bounded(pool):
    with pytest.raises(MemoryError):
        call(pool, allocate, 512 * MIB)
    assert call(pool, allocate, 64 * MIB) == 64 * MIB


def test_a_crash_costs_its_own_job(pool):
    others = [pool.submit(lambda call: call(time.sleep, 0.05, **BOUNDS)) for _ in range(8)]
    with pytest.raises(WorkerCrashed, match="SIGSEGV"):
        call(pool, crash)
    for other in others:
        assert other.future.result(60) is None


def test_killed_while_idle_they_are_replaced(pool):
    for _ in range(2):
        call(pool, len, b"")
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # until it has ended
        jobs = [pool.submit(lambda call: call(len, b"123", **BOUNDS)) for _ in range(8)]
        assert [job.future.result(60) for job in jobs] == [3] * 8


def test_a_cancelled_job_stops(pool):
    async def run():
        task = asyncio.create_task(pool.run(lambda call: call(time.sleep, 60, cpu_s=1, timeout_s=60)))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        begun = time.monotonic()
        await asyncio.gather(*(pool.run(lambda call: call(len, b"", **BOUNDS)) for _ in range(4)))
        assert time.monotonic() - begun < 30

    asyncio.run(run())


def test_a_cancelled_job_in_the_queue_does_not_run(pool):
    ran = []
    busy = [pool.submit(lambda call: call(time.sleep, 0.3, **BOUNDS)) for _ in range(2)]
    waiting = pool.submit(lambda call: ran.append(1))
    waiting.cancel()
    for job in busy:
        job.future.result(60)
    call(pool, len, b"")
    assert waiting.future.cancelled() and not ran


def test_close_ends_processes_and_jobs():
    pool = WorkerPool(1, "closing", memory_bytes=256 * MIB)
    call(pool, len, b"")
    (pid,) = pool.pids
    running, queued = (pool.submit(lambda call: call(time.sleep, 60, **BOUNDS)) for _ in range(2))
    time.sleep(0.2)
    pool.close()
    with pytest.raises(WorkerTimeout, match="cancelled"):
        running.future.result(10)
    assert queued.future.cancelled()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
