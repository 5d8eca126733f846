"""The masks of many answers, made in threads while the device computes the scores that they will be laid over."""

import os
import time
from collections.abc import Sequence
from concurrent import futures

from serve.engine.request_state import RequestState

THREADS = 8  # llguidance lets go of Python's lock
PATIENCE_S = 1e-3  # that a step may wait for masks; the device has the step before to work on


class GrammarMasks:
    """Makes masks. `close` it."""

    def __init__(self):
        self.seconds = 0.0  # spent on masks, in all threads together
        self._threads = min(THREADS, os.cpu_count() or 1)
        self._pool = futures.ThreadPoolExecutor(self._threads, thread_name_prefix="mask")
        self._making: set[futures.Future] = set()

    def make(self, answers: Sequence[RequestState]) -> None:
        """Begins with the next masks of answers that have just been given a token."""
        for answer in answers:
            answer.mask = None
        shares = (answers[i :: self._threads] for i in range(self._threads))
        self._making |= {self._pool.submit(_make, share) for share in shares if share}

    def settle(self) -> list[tuple[RequestState, Exception]]:
        """Waits a little for what is being made; returns those whose constraint has failed."""
        done, self._making = futures.wait(self._making, PATIENCE_S)
        failed: list[tuple[RequestState, Exception]] = []
        for seconds, theirs in (future.result() for future in done):
            self.seconds += seconds
            failed += theirs
        return failed

    def close(self) -> None:
        """Begins no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _make(share: Sequence[RequestState]) -> tuple[float, list[tuple[RequestState, Exception]]]:
    """The seconds it took, and whose constraint has failed."""
    begun, failed = time.perf_counter(), []
    for answer in share:
        constraint = answer.work.options.constraint
        try:
            constraint.advance(answer.newest)
            answer.mask = constraint.mask()
        except Exception as error:  # this answer's alone
            failed.append((answer, error))
    return time.perf_counter() - begun, failed
