"""Processes that open pictures and videos and cut them, so that the server's threads need not wait for the GIL meanwhile.

Decoding and resizing let go of it, but between them a photograph of 1280 x 720 is copied six times while it is held, which
is as long as a step of the engine takes. What goes to a process and what comes back passes through memory that both see (memfd,
Linux): a pipe takes 64 KB at a time, and the GIL for each. A decoder that crashes takes its process along, and not the server.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from minicpmv46_jax.processing.images import ImageSlice, SlicedImage
from minicpmv46_jax.processing.media_job import MediaJob, process_media

log = logging.getLogger("serve")

MOST = 8  # processes; one photograph takes some 40 ms

Grid = tuple[int, int]
Layout = list[tuple[Grid, list[tuple[Grid, tuple[int, int]]]]]
"""Of each cut its grid, and of its crops each one's grid and the shape of its pixels, in the order in which they lie."""


def processes_for(accelerator: bool) -> int:
    """How many are worth their memory, 100 MB each: half the cores beside an accelerator, none beside a model on the CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, cores // 2) if accelerator and hasattr(os, "memfd_create") else 0


class ImageWorkerPool:
    """A `processing.cutting.MediaWorker` of so many processes; started now, they are ready in about a second. `close` them.

    Raises ValueError where the platform has no memory that processes share without a name.
    """

    def __init__(self, processes: int):
        if not hasattr(os, "memfd_create"):
            raise ValueError(f"--picture-processes is {processes}, which needs Linux; 0 prepares them in the server's threads")
        self._processes = processes
        self._changing = threading.Lock()
        self._pool = self._started()

    def __call__(self, cutting: MediaJob) -> tuple[SlicedImage, ...]:
        """Waits for one of the processes to do it."""
        if not isinstance(cutting.source, (str, bytes, bytearray, Path)):
            return process_media(cutting)  # decoded already
        pool = self._pool
        try:
            return _cut_in(pool, cutting)
        except BrokenProcessPool:
            log.warning("a process that prepared pictures has ended; all of them are started anew")
            with self._changing:
                if self._pool is pool:
                    self._pool = self._started()
        return _cut_in(self._pool, cutting)  # once more: it need not have been this picture

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _started(self) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(self._processes, multiprocessing.get_context("spawn"), initializer=_begin)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as it will be in them: Ctrl-C is for the server
        try:
            for _ in range(self._processes):
                pool.submit(int)  # each starts a process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pool


def _cut_in(pool: ProcessPoolExecutor, cutting: MediaJob) -> tuple[SlicedImage, ...]:
    source = cutting.source
    with contextlib.ExitStack() as cleanup:
        shared = os.memfd_create("picture")
        cleanup.callback(os.close, shared)
        if not isinstance(source, Path):
            _write(shared, source.encode() if isinstance(source, str) else source)
            cutting = dataclasses.replace(cutting, source=type(source)())
        layout = pool.submit(_work, cutting, f"/proc/{os.getpid()}/fd/{shared}").result()
        pixels = _read(shared)  # a mapping would keep a descriptor for as long as a picture waits
    return tuple(_taken_apart(layout, pixels))


def _taken_apart(layout: Layout, pixels: np.ndarray) -> Iterator[SlicedImage]:
    at = 0
    for grid, crops in layout:
        made = []
        for own, (rows, columns) in crops:
            made.append(ImageSlice(pixels[at : at + rows * columns].reshape(rows, columns), own))
            at += rows * columns
        yield SlicedImage(tuple(made), grid)


def _work(cutting: MediaJob, shared: str) -> Layout:
    """In the process: from what lies in the shared memory to what is to lie there."""
    with open(shared, "r+b", buffering=0) as file:
        if not isinstance(cutting.source, Path):
            data = file.read()
            cutting = dataclasses.replace(cutting, source=data.decode() if isinstance(cutting.source, str) else data)
        cuts = process_media(cutting)
        file.truncate(0)
        file.seek(0)
        for crop in (crop for cut in cuts for crop in cut.slices):
            _write(file.fileno(), crop.pixels)
    return [(cut.grid, [(crop.grid, crop.pixels.shape) for crop in cut.slices]) for cut in cuts]


def _write(file: int, data: bytes | bytearray | np.ndarray) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(file, rest) :]


def _read(file: int) -> np.ndarray:
    content = np.empty(os.fstat(file).st_size, np.uint8)
    rest = memoryview(content)
    while rest:
        rest = rest[os.preadv(file, [rest], len(content) - len(rest)) :]
    return content


def _begin() -> None:
    """In each process, first: it ends with the server, even if that is killed."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
