"""Worker processes that measure, decode, resize and slice images and videos.

Decoding and resizing release Python's lock. Between them an image is copied several times while the lock is
held, and a photograph's copies take as long as an engine step. Media and pixels pass through shared memory
(memfd, Linux), because a pipe takes 64 KB at a time and the lock for each. Processor time, elapsed time and
memory of each image or video are bounded (`WorkerPool`): a few hundred kilobytes can take hours to decode.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from minicpmv46_jax.processing.images import ImageSlice, SlicedImage
from minicpmv46_jax.processing.media_job import MediaJob, MediaMeasure, measure_media, process_media
from serve.runtime.worker_pool import Call, WorkerCrashed, WorkerFailed, WorkerPool

log = logging.getLogger("serve")

MAX_WORKERS = 8  # one photograph takes some 40 ms
MEMORY_BYTES = 4 * 2**30  # of a process; the largest image allowed takes 1 GiB
MAX_IMAGE_SECONDS = 20.0  # of processor time; the largest photograph allowed takes some 4
MAX_SECONDS = 24 * 3600.0  # of a video without a limit
SPARE_S = 30.0  # elapsed time beyond the processor time, on a busy machine
THREADS = 4  # of `ImageThreads`

T = TypeVar("T")
Grid = tuple[int, int]
Measured = MediaMeasure | ValueError
InWorker = Callable[[list[tuple[MediaJob, int]], str], T]
"""A function of the worker process: jobs with the bytes of their media, and the file that holds them."""

PixelShapes = list[tuple[Grid, list[tuple[Grid, tuple[int, int]]]]]
"""Grid of each image, and grid and pixel shape of each of its slices, in the order of the shared memory."""


def default_workers() -> int:
    """Returns half the CPU cores, at least 1; 0 where there is no anonymous shared memory.

    A worker takes about 100 MB of memory.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // 2)) if hasattr(os, "memfd_create") else 0


@runtime_checkable
class MediaWorkers(Protocol):
    """Measures and slices the images and videos of requests."""

    async def measure(self, jobs: Sequence[MediaJob]) -> list[Measured]:
        """Runs `media_job.measure_media` for each job."""
        ...

    async def process(self, job: MediaJob) -> tuple[SlicedImage, ...]:
        """Runs `media_job.process_media`."""
        ...

    def close(self) -> None:
        """Ends the threads or processes."""
        ...


class ImageThreads:
    """Media workers in threads of this process. A job that has begun runs to its end, whatever it costs."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="image")

    async def measure(self, jobs: Sequence[MediaJob]) -> list[Measured]:
        """Runs `media_job.measure_media` for each job, in one thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, _measure_all, jobs)

    async def process(self, job: MediaJob) -> tuple[SlicedImage, ...]:
        """Runs `media_job.process_media` in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, process_media, job)

    def close(self) -> None:
        """Drops jobs that have not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class ImageWorkerPool:
    """Media workers in processes. `close` it.

    The processes start at once and are ready after about a second. A job whose process crashes is tried once
    more in a new process, because something else may have killed the first.

    Args:
      num_workers: number of processes.
      max_image_seconds: processor time of an image. A video has the time of its limits on each core.

    Raises:
      ValueError: the platform has no anonymous shared memory.
    """

    def __init__(self, num_workers: int, max_image_seconds: float | int = MAX_IMAGE_SECONDS):
        if not hasattr(os, "memfd_create"):
            raise ValueError(
                f"--picture-processes is {num_workers}, which needs Linux; 0 prepares images in the server's threads"
            )
        self._max_image_seconds = max_image_seconds
        self.pool = WorkerPool(num_workers, "image-worker", MEMORY_BYTES)

    async def measure(self, jobs: Sequence[MediaJob]) -> list[Measured]:
        """Runs `media_job.measure_media` for each job in one worker process.

        All media pass at once. If one of them ends the process, each is measured alone.

        Returns:
          For each job its measure, or a ValueError: as `measure_media` raises it, or the job exceeds a bound,
          or crashes its process twice.
        """
        return await self.pool.run(lambda call: self._measure(call, jobs))

    async def process(self, job: MediaJob) -> tuple[SlicedImage, ...]:
        """Runs `media_job.process_media` in a worker process. Raises the errors that `measure` returns."""
        shapes, pixels = await self.pool.run(lambda call: self._run(call, job, _process_in_worker))
        return tuple(_unpack_images(shapes, pixels))

    def _measure(self, call: Call, jobs: Sequence[MediaJob]) -> list[Measured]:
        if len(jobs) > 1:
            with contextlib.suppress(WorkerFailed, MemoryError):
                measures, _ = self._run_once(call, jobs, _measure_in_worker)
                return measures
        return [self._measure_alone(call, job) for job in jobs]

    def _measure_alone(self, call: Call, job: MediaJob) -> Measured:
        try:
            (measured,), _ = self._run(call, job, _measure_in_worker)
            return measured
        except ValueError as error:
            return error

    def close(self) -> None:
        """Ends the worker processes."""
        self.pool.close()

    def _run(self, call: Call, job: MediaJob, function: InWorker[T]) -> tuple[T, np.ndarray]:
        """Returns a function's result in a worker process, and what it has written to the shared memory."""
        try:
            try:
                return self._run_once(call, [job], function)
            except WorkerCrashed as error:
                log.warning("an image worker process %s; its image is tried once more", error)
                return self._run_once(call, [job], function)
        except MemoryError:
            raise ValueError(f"{job.name}: decoding the {job.kind} takes more than {MEMORY_BYTES >> 30} GiB of memory") from None
        except WorkerFailed as error:
            raise ValueError(f"{job.name}: decoding the {job.kind} {error}") from None

    def _run_once(self, call: Call, jobs: Sequence[MediaJob], function: InWorker[T]) -> tuple[T, np.ndarray]:
        limits = [self._limits(job) for job in jobs]
        with contextlib.ExitStack() as cleanup:
            shared_fd = os.memfd_create("image")
            cleanup.callback(os.close, shared_fd)
            sent = [(dataclasses.replace(job, source=_emptied(job.source)), _write_source(shared_fd, job.source)) for job in jobs]
            bounds = {"cpu_s": sum(cpu for cpu, _ in limits), "timeout_s": sum(elapsed for _, elapsed in limits) + SPARE_S}
            result = call(function, sent, f"/proc/{os.getpid()}/fd/{shared_fd}", **bounds)
            return result, _read_all(shared_fd)  # a copy, because a mapping would hold a descriptor while the image waits

    def _limits(self, job: MediaJob) -> tuple[float | int, float | int]:
        """Returns the processor time and the elapsed time of a job, in seconds."""
        if job.kind != "video":
            return self._max_image_seconds, self._max_image_seconds
        seconds = min(job.limits.max_seconds, MAX_SECONDS)
        return seconds * (os.cpu_count() or 1), seconds


def _emptied(source: str | bytes | bytearray | Path) -> str | bytes | bytearray | Path:
    """Returns an empty source of the same type; a path as it is."""
    return source if isinstance(source, Path) else type(source)()


def _write_source(fd: int, source: str | bytes | bytearray | Path) -> int:
    """Appends a source to the shared memory and returns its length in bytes."""
    if isinstance(source, Path):
        return 0
    data = source.encode() if isinstance(source, str) else source
    _write_all(fd, data)
    return len(data)


def _measure_all(jobs: Sequence[MediaJob]) -> list[Measured]:
    measures: list[Measured] = []
    for job in jobs:
        try:
            measures.append(measure_media(job))
        except ValueError as error:
            measures.append(error)
    return measures


def _unpack_images(shapes: PixelShapes, pixels: np.ndarray) -> Iterator[SlicedImage]:
    offset = 0
    for grid, slice_shapes in shapes:
        slices = []
        for slice_grid, (rows, columns) in slice_shapes:
            slices.append(ImageSlice(pixels[offset : offset + rows * columns].reshape(rows, columns), slice_grid))
            offset += rows * columns
        yield SlicedImage(tuple(slices), grid)


def _measure_in_worker(sent: list[tuple[MediaJob, int]], shared_path: str) -> list[Measured]:
    with open(shared_path, "r+b", buffering=0) as file:
        measures = _measure_all([_with_source(job, file.read(length)) for job, length in sent])
        file.truncate(0)
    return measures


def _process_in_worker(sent: list[tuple[MediaJob, int]], shared_path: str) -> PixelShapes:
    """Replaces the media in the shared memory by the pixels of its slices, and returns their shapes."""
    ((job, length),) = sent
    with open(shared_path, "r+b", buffering=0) as file:
        images = process_media(_with_source(job, file.read(length)))
        file.truncate(0)
        file.seek(0)
        for image_slice in (image_slice for image in images for image_slice in image.slices):
            _write_all(file.fileno(), image_slice.pixels)
    return [(image.grid, [(image_slice.grid, image_slice.pixels.shape) for image_slice in image.slices]) for image in images]


def _with_source(job: MediaJob, data: bytes) -> MediaJob:
    """Returns the job with the media that the shared memory holds in place of its empty source."""
    if isinstance(job.source, Path):
        return job
    return dataclasses.replace(job, source=data.decode() if isinstance(job.source, str) else data)


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
