"""Threads for pixel arithmetic, which releases the GIL. Few, because they work on one image at a time."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

MAX_THREADS = 4


def num_threads() -> int:
    """Returns the number of threads that work on one image."""
    return min(MAX_THREADS, os.cpu_count() or 1)


@functools.cache
def pixel_pool() -> ThreadPoolExecutor:
    """Returns the process's thread pool. A task in it must not wait for another task in it."""
    return ThreadPoolExecutor(num_threads(), thread_name_prefix="pixels")


if hasattr(os, "register_at_fork"):  # Windows cannot fork
    os.register_at_fork(after_in_child=pixel_pool.cache_clear)  # a forked child has none of its parent's threads
