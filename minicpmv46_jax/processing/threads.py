"""Threads for work on pixels, which lets go of the GIL: a few, for one picture is to be ready sooner, not many at once."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

MAX_THREADS = 4


def num_threads() -> int:
    """How many parts a picture is worked on in."""
    return min(MAX_THREADS, os.cpu_count() or 1)


@functools.cache
def pixel_pool() -> ThreadPoolExecutor:
    """The process's own. What runs in it must not wait for more of its threads."""
    return ThreadPoolExecutor(num_threads(), thread_name_prefix="pixels")


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=pixel_pool.cache_clear)  # threads stay behind in the parent
