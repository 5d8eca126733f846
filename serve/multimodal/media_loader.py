"""Media of a request: fetched, measured, checked against the context, and only then decoded.

Everything waits in tasks of the event loop, so a slow host or a large video delays no other request's text.
A request that is cancelled stops its downloads and its jobs.
"""

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Protocol, TypeVar, runtime_checkable

from minicpmv46_jax.processing import PromptPlan
from minicpmv46_jax.processing.chat import PlannedMedia
from minicpmv46_jax.processing.images import SlicedImage, SliceLayout
from minicpmv46_jax.processing.media_job import MediaJob
from minicpmv46_jax.processing.sources import describe, is_data_url, read
from serve.multimodal.image_workers import MediaWorkers
from serve.multimodal.media_fetcher import MediaFetcher
from serve.runtime.budget import Budget, RequestMemory

MAX_DOWNLOADS = 64  # of all requests at once
PARALLEL = 4  # downloads or jobs of one request at once, so that one request does not keep all workers
MAX_FETCH_S = 60.0  # for all downloads of a request together

T = TypeVar("T")
RunInThread = Callable[..., Awaitable[Any]]


@runtime_checkable
class MediaProcessor(Protocol):
    """The part of `processing.Processor` that loading needs."""

    def media_job(self, item: PlannedMedia, source: Any) -> MediaJob:
        """Returns the job of a media part."""
        ...


class MediaLoader:
    """Loads the images and videos of requests.

    Args:
      fetcher: the server's rules for URLs and paths.
      workers: measure and decode.
      run_in_thread: runs a function that reads the file system.
    """

    def __init__(self, fetcher: MediaFetcher, workers: MediaWorkers, run_in_thread: RunInThread):
        self._fetcher, self._workers, self._run_in_thread = fetcher, workers, run_in_thread
        self._downloads = Budget(MAX_DOWNLOADS)

    async def measure(self, processor: MediaProcessor, plan: PromptPlan, memory: RequestMemory) -> list[MediaJob]:
        """Fetches a prompt's media and reads their headers.

        Args:
          processor: makes the jobs.
          plan: the prompt.
          memory: counts the downloads.

        Returns:
          A job for each image and video, in prompt order; `layouts` is known for each.

        Raises:
          ValueError: an image or video is not available, is none, or is too large; the message starts with
            its position in the messages.
          EngineFull: all requests together hold too much.
        """
        try:
            async with asyncio.timeout(MAX_FETCH_S):
                sources = await _each(lambda item: self._source(item, memory), plan.media)
        except TimeoutError:
            message = f"{plan.media[0].where}: its media were not fetched within {MAX_FETCH_S:g} seconds in all"
            raise ValueError(message) from None
        jobs = [processor.media_job(item, source) for item, source in zip(plan.media, sources, strict=True)]
        return await self._measured(plan, jobs)

    async def process(self, plan: PromptPlan, jobs: list[MediaJob], memory: RequestMemory) -> list[tuple[SlicedImage, ...]]:
        """Decodes and slices measured media, once there is room for their pixels.

        Returns:
          For each job one sliced image, or for a video one per frame or composite.

        Raises:
          ValueError: an image or video is broken; the message starts with its position in the messages.
        """
        await memory.hold_pixels(3 * sum(layout.num_pixels for job in jobs for layout in layouts(job)))
        return await _each(lambda i: self._process(plan.media[i], jobs[i]), range(len(jobs)))

    def close(self) -> None:
        """Ends the workers."""
        self._workers.close()

    async def _source(self, item: PlannedMedia, memory: RequestMemory) -> Any:
        """Returns the item's data URL, its bytes, or its file."""
        source = item.source
        with _named(item):
            if not isinstance(source, str):
                raise ValueError(f"{describe(source)}: expected a URL of the {item.kind}, as a text")
            if is_data_url(source):
                return source
            async with self._download_slot():
                found = await self._fetcher.fetch(source, memory.hold_source)
            return found if isinstance(found, bytes) and found else await self._run_in_thread(read, source, lambda _: found)

    @contextlib.asynccontextmanager
    async def _download_slot(self) -> AsyncIterator[None]:
        await self._downloads.acquire(1)
        try:
            yield
        finally:
            self._downloads.release(1)

    async def _measured(self, plan: PromptPlan, jobs: list[MediaJob]) -> list[MediaJob]:
        """Returns the jobs with their measures: images together, videos, which may take seconds, alone."""
        images = [i for i, job in enumerate(jobs) if job.kind == "image"]
        groups = [images, *([i] for i, job in enumerate(jobs) if job.kind != "image")]
        found = await _each(lambda group: self._workers.measure([jobs[i] for i in group]), filter(None, groups))
        measures = dict(zip(itertools.chain(*groups), itertools.chain(*found), strict=True))
        for i, item in enumerate(plan.media):
            if isinstance(error := measures[i], ValueError):
                with _named(item):
                    raise error
        return [dataclasses.replace(job, measure=measures[i]) for i, job in enumerate(jobs)]

    async def _process(self, item: PlannedMedia, job: MediaJob) -> tuple[SlicedImage, ...]:
        with _named(item):
            return await self._workers.process(job)


def layouts(job: MediaJob) -> tuple[SliceLayout, ...]:
    """Returns the layouts of a measured job's images."""
    assert job.measure is not None
    return job.measure.layouts


@contextlib.contextmanager
def _named(item: PlannedMedia):
    """Puts the item's position before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{item.where}: {error}") from error


async def _each(function: Callable[[Any], Awaitable[T]], arguments: Iterable[Any]) -> list[T]:
    """Awaits the function for all arguments, PARALLEL at once. The first error cancels the others."""
    running = asyncio.Semaphore(PARALLEL)

    async def run(argument: Any) -> T:
        async with running:
            return await function(argument)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(argument)) for argument in arguments]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
