"""Threads with a large stack, because llguidance recurses along the references of a grammar."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

STACK_BYTES = 256 * 2**20  # address space; only pages that a compilation reaches take memory
_pool = ThreadPoolExecutor(2, thread_name_prefix="grammar")
_starting = threading.Lock()  # `threading.stack_size` is one setting for the process


def run_on_large_stack(function: Callable[..., T], *args) -> Future[T]:
    """Runs a function in one of two threads with a stack of STACK_BYTES."""
    with _starting:
        default = threading.stack_size(STACK_BYTES)
        try:
            return _pool.submit(function, *args)  # may start a thread
        finally:
            threading.stack_size(default)
