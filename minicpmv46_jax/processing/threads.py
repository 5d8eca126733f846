"""Threads for work on pixels, which lets go of the GIL: a few, for one picture is to be ready sooner, not many at once."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

MOST = 4


def several() -> int:
    """How many parts a picture is worked on in."""
    return min(MOST, os.cpu_count() or 1)


@functools.cache
def pool() -> ThreadPoolExecutor:
    """The process's own. What runs in it must not wait for more of its threads."""
    return ThreadPoolExecutor(several(), thread_name_prefix="pixels")


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=pool.cache_clear)  # threads stay behind in the parent
