"""Grammar masks of structured output, computed in threads while the device computes the logits."""

import os
import time
from collections.abc import Sequence
from concurrent import futures

from serve.engine.request_state import RequestState

THREADS = 8  # llguidance releases the GIL
MASK_WAIT_S = 1e-3  # that a step waits for masks, while the device runs the step before


class GrammarMasks:
    """Computes grammar masks. `close` it."""

    def __init__(self):
        self.seconds = 0.0  # spent on masks, summed over all threads
        self._num_threads = min(THREADS, os.cpu_count() or 1)
        self._pool = futures.ThreadPoolExecutor(self._num_threads, thread_name_prefix="mask")
        self._pending: dict[futures.Future, Sequence[RequestState]] = {}

    def submit(self, states: Sequence[RequestState]) -> None:
        """Starts computing the next masks of requests that have just received a token."""
        for state in states:
            state.mask = None
        shares = (states[i :: self._num_threads] for i in range(self._num_threads))
        for share in filter(None, shares):
            self._pending[self._pool.submit(_compute_masks, share)] = share

    def collect(self) -> list[tuple[RequestState, BaseException]]:
        """Waits up to MASK_WAIT_S for pending masks; returns the requests whose constraint has failed."""
        failed: list[tuple[RequestState, BaseException]] = []
        for future in futures.wait(self._pending, MASK_WAIT_S).done:
            states = self._pending.pop(future)
            if (error := future.exception()) is not None:
                failed += [(state, error) for state in states]
            else:
                seconds, failures = future.result()
                self.seconds += seconds
                failed += failures
        return failed

    def close(self) -> None:
        """Cancels masks that have not been started."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _compute_masks(states: Sequence[RequestState]) -> tuple[float, list[tuple[RequestState, BaseException]]]:
    """Returns the seconds it took, and the requests whose constraint has failed."""
    begun, failed = time.perf_counter(), []
    for state in states:
        constraint = state.request.options.constraint
        assert constraint is not None  # only requests with a grammar are submitted
        try:
            constraint.advance(state.last_token_id)
            state.mask = constraint.mask()
        except BaseException as error:  # fails this request alone; a panic of a Rust library is no Exception
            failed.append((state, error))
    return time.perf_counter() - begun, failed
