"""Worker processes that decode, resize and slice images and videos outside of the server's GIL.

Decoding and resizing release the GIL. Between them an image is copied several times while the GIL is held,
and a photograph's copies take as long as an engine step. Media and pixels pass through shared memory (memfd,
Linux), because a pipe takes 64 KB at a time and the GIL for each. A decoder that crashes ends its worker
process, not the server.
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

MAX_WORKERS = 8  # one photograph takes some 40 ms

Grid = tuple[int, int]
PixelShapes = list[tuple[Grid, list[tuple[Grid, tuple[int, int]]]]]
"""Grid of each image, and grid and pixel shape of each of its slices, in the order of the shared memory."""


def default_workers(accelerator: bool) -> int:
    """Returns half the CPU cores beside an accelerator, and 0 beside a model that runs on the CPU.

    A worker takes about 100 MB of memory.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores // 2) if accelerator and hasattr(os, "memfd_create") else 0


class ImageWorkerPool:
    """A `processing.media_job.MediaWorker` that runs jobs in worker processes. `close` it.

    The processes start at once and are ready after about a second.

    Raises ValueError on platforms without anonymous shared memory.
    """

    def __init__(self, num_workers: int):
        if not hasattr(os, "memfd_create"):
            raise ValueError(
                f"--picture-processes is {num_workers}, which needs Linux; 0 prepares images in the server's threads"
            )
        self._num_workers = num_workers
        self._restart_lock = threading.Lock()
        self._pool = self._start_pool()

    def __call__(self, job: MediaJob) -> tuple[SlicedImage, ...]:
        """Runs a job in a worker process and waits for its result."""
        if not isinstance(job.source, (str, bytes, bytearray, Path)):
            return process_media(job)  # decoded already
        pool = self._pool
        try:
            return _process_in_pool(pool, job)
        except BrokenProcessPool:
            log.warning("an image worker process has died; the pool restarts")
            with self._restart_lock:
                if self._pool is pool:
                    self._pool = self._start_pool()
        return _process_in_pool(self._pool, job)  # retries once: another image may have crashed the worker

    def close(self) -> None:
        """Ends the worker processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start_pool(self) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(self._num_workers, multiprocessing.get_context("spawn"), initializer=_init_worker)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers inherit it: Ctrl-C is for the server
        try:
            for _ in range(self._num_workers):
                pool.submit(int)  # each submission starts a process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pool


def _process_in_pool(pool: ProcessPoolExecutor, job: MediaJob) -> tuple[SlicedImage, ...]:
    source = job.source
    with contextlib.ExitStack() as cleanup:
        shared_fd = os.memfd_create("image")
        cleanup.callback(os.close, shared_fd)
        if not isinstance(source, Path):
            _write_all(shared_fd, source.encode() if isinstance(source, str) else source)
            job = dataclasses.replace(job, source=type(source)())
        shapes = pool.submit(_process_in_worker, job, f"/proc/{os.getpid()}/fd/{shared_fd}").result()
        pixels = _read_all(shared_fd)  # a copy, because a mapping would hold a descriptor while the image waits
    return tuple(_unpack_images(shapes, pixels))


def _unpack_images(shapes: PixelShapes, pixels: np.ndarray) -> Iterator[SlicedImage]:
    offset = 0
    for grid, slice_shapes in shapes:
        slices = []
        for slice_grid, (rows, columns) in slice_shapes:
            slices.append(ImageSlice(pixels[offset : offset + rows * columns].reshape(rows, columns), slice_grid))
            offset += rows * columns
        yield SlicedImage(tuple(slices), grid)


def _process_in_worker(job: MediaJob, shared_path: str) -> PixelShapes:
    """Replaces the media in the shared memory by the pixels of its slices, and returns their shapes."""
    with open(shared_path, "r+b", buffering=0) as file:
        if not isinstance(job.source, Path):
            data = file.read()
            job = dataclasses.replace(job, source=data.decode() if isinstance(job.source, str) else data)
        images = process_media(job)
        file.truncate(0)
        file.seek(0)
        for image_slice in (image_slice for image in images for image_slice in image.slices):
            _write_all(file.fileno(), image_slice.pixels)
    return [(image.grid, [(image_slice.grid, image_slice.pixels.shape) for image_slice in image.slices]) for image in images]


def _write_all(fd: int, data: bytes | bytearray | np.ndarray) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]


def _read_all(fd: int) -> np.ndarray:
    content = np.empty(os.fstat(fd).st_size, np.uint8)
    rest = memoryview(content)
    while rest:
        rest = rest[os.preadv(fd, [rest], len(content) - len(rest)) :]
    return content


def _init_worker() -> None:
    """Makes a worker process end with the server, even if the server is killed."""

    def exit_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # None only in the server itself
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
