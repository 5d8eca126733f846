"""Image workers: the same slices and errors as in this process, and no process left behind."""

import asyncio
import base64
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from minicpmv46_jax.processing import MediaConfig, Processor
from minicpmv46_jax.processing.media_job import MediaJob, measure_media, process_media
from minicpmv46_jax.processing.video import NO_VIDEO_LIMITS
from serve.multimodal.image_workers import MAX_WORKERS, ImageWorkerPool, default_workers
from tests import ROOT
from tests.minicpmv46_jax.processing.test_images import PHOTOS
from tests.serve.api.test_clients import clip


class Workers:
    """A pool whose jobs are run one after another, from a test without an event loop."""

    def __init__(self, number, **options):
        self.pool = ImageWorkerPool(number, **options)

    def process(self, job):
        return asyncio.run(self.pool.process(job))

    def measure(self, *jobs):
        for measured in (found := asyncio.run(self.pool.measure(jobs))):
            if isinstance(measured, ValueError):
                raise measured
        return found[0] if len(found) == 1 else found


@pytest.fixture(scope="module")
def image_workers():
    workers = Workers(2)
    yield workers
    workers.pool.close()


@pytest.fixture(scope="module")
def processor(demo_folder):
    return Processor.from_folder(demo_folder)


def media_job(processor, source, kind="image", **changes):
    config: MediaConfig = processor.image_config if kind == "image" else processor.video_config
    job = MediaJob(kind, source, "its name", config, config.options, 10**8, NO_VIDEO_LIMITS)
    return dataclasses.replace(job, **changes)


def assert_equal(found, expected):
    assert [image.grid for image in found] == [image.grid for image in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.grid for one in ours.slices] == [one.grid for one in theirs.slices]
        for one, other in zip(ours.slices, theirs.slices, strict=True):
            np.testing.assert_array_equal(one.pixels, other.pixels)


def data_url(path):
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.mark.parametrize("source", [PHOTOS[0], PHOTOS[1].read_bytes(), bytearray(PHOTOS[0].read_bytes()), data_url(PHOTOS[1])])
def test_images_are_sliced_as_in_this_process(image_workers, processor, source):
    job = media_job(processor, source)
    found = image_workers.process(job)
    assert len(found[0].slices) > 1
    assert_equal(found, process_media(job))


def test_videos_are_sliced_as_in_this_process(image_workers, processor):
    job = media_job(processor, clip(6), "video")
    found = image_workers.process(job)
    assert len(found) > 1
    assert_equal(found, process_media(job))


def test_concurrent_jobs(image_workers, processor):
    jobs = [media_job(processor, path) for path in PHOTOS] * 10

    async def run():
        return await asyncio.gather(*map(image_workers.pool.process, jobs))

    for found, expected in zip(asyncio.run(run()), [process_media(job) for job in jobs[:2]] * 10, strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("source, kind", [(PHOTOS[0], "image"), (data_url(PHOTOS[1]), "image"), (None, "video")])
@pytest.mark.parametrize("changes", [{}, {"max_slice_nums": 1}, {"downsample_mode": "4x", "stack_frames": 3}])
def test_measures_are_the_sizes_of_the_result(image_workers, processor, source, kind, changes):
    job = media_job(processor, source or clip(6), kind)
    job = dataclasses.replace(job, options=dataclasses.replace(job.options, **changes))
    measure = image_workers.measure(job)
    found = process_media(dataclasses.replace(job, measure=measure))
    assert_equal(found, process_media(job))
    assert [layout.grid for layout in measure.layouts] == [image.grid for image in found]
    patch = job.config.patch_size
    pixels = [sum(len(one.pixels) for one in image.slices) * patch**2 for image in found]
    assert [layout.num_pixels for layout in measure.layouts] == pixels
    assert [layout.num_views for layout in measure.layouts] == [len(image.slices) for image in found]


def test_images_are_measured_together(image_workers, processor):
    jobs = [media_job(processor, source) for source in (PHOTOS[0], PHOTOS[1].read_bytes(), data_url(PHOTOS[0]))]
    assert image_workers.measure(*jobs) == [measure_media(job) for job in jobs]
    bad = media_job(processor, b"no image")
    found = asyncio.run(image_workers.pool.measure([jobs[0], bad, jobs[2]]))
    assert found[::2] == [measure_media(jobs[0]), measure_media(jobs[2])]
    assert isinstance(found[1], ValueError) and "not an image" in str(found[1])


def test_images_beside_one_that_crashes_are_measured(monkeypatch, tmp_path, processor):
    code = """
        import os
        from minicpmv46_jax.processing.media_job import measure_media
        def work(sent, path):
            if sent[-1][0].name == "bad":
                os.abort()
            return [measure_media(job) for job, _ in sent]
    """
    (tmp_path / "measurer_that_crashes.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    own, good = Workers(1), media_job(processor, PHOTOS[0])
    try:
        work = importlib.import_module("measurer_that_crashes").work
        monkeypatch.setattr("serve.multimodal.image_workers._measure_in_worker", work)
        found = asyncio.run(own.pool.measure([good, dataclasses.replace(good, name="bad")]))
        assert found[0] == measure_media(good) and "SIGABRT" in str(found[1])
    finally:
        own.pool.close()


def test_errors_are_those_of_this_process(image_workers, processor):
    for job in (
        media_job(processor, b"no image"),
        media_job(processor, b""),
        media_job(processor, "data:image/png;base64,???"),
        media_job(processor, ROOT / "no such file"),
        media_job(processor, PHOTOS[0], max_pixels=1000),
        media_job(processor, b"no video", "video"),
    ):
        with pytest.raises(ValueError) as here:
            process_media(job)
        with pytest.raises(ValueError) as measured:
            image_workers.measure(job)
        assert str(measured.value) == str(here.value)
        with pytest.raises(ValueError) as there:
            image_workers.process(job)
        assert str(there.value) == str(here.value)


def test_unfetched_url_is_a_bug_and_is_not_fetched(image_workers, processor):
    for media_worker in (process_media, image_workers.process, image_workers.measure):
        for kind in ("image", "video"):
            with pytest.raises(AssertionError, match=r"http://127\.0\.0\.1:9/x should have been fetched"):
                media_worker(media_job(processor, "http://127.0.0.1:9/x", kind))


def test_workers_import_no_jax(image_workers, processor):
    """Importing it would cost each worker seconds and hundreds of megabytes."""
    image_workers.process(media_job(processor, PHOTOS[0]))
    imported = "[name for name in ('jax', 'transformers', 'fastapi') if name in __import__('sys').modules]"
    job = image_workers.pool.pool.submit(lambda call: call(eval, imported, cpu_s=10, timeout_s=60))
    assert job.future.result() == []


def test_results_hold_no_file_descriptors(image_workers, processor):
    """Hundreds of results may wait, and a process may have a thousand descriptors."""
    before = len(os.listdir("/proc/self/fd"))
    found = [image_workers.process(media_job(processor, PHOTOS[0])) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(found) == 5


def test_a_killed_worker_costs_no_image(image_workers, processor):
    """Both processes are killed twice while eight images are decoded."""
    job = media_job(processor, PHOTOS[0])
    expected = process_media(job)

    async def run():
        running = [asyncio.create_task(image_workers.pool.process(job)) for _ in range(8)]
        for _ in range(2):
            await asyncio.sleep(0.1)
            for pid in image_workers.pool.pool.pids:
                os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*running, return_exceptions=True)

    results = asyncio.run(run())
    failed = [result for result in results if isinstance(result, Exception)]
    assert len(failed) <= 2  # those that were under way at both times
    assert all("decoding the image ended its process (SIGKILL)" in str(error) for error in failed)
    for result in results:
        if not isinstance(result, Exception):
            assert_equal(result, expected)


def test_an_image_that_crashes_its_worker_fails_alone(monkeypatch, tmp_path, processor, caplog):
    (tmp_path / "decoder_that_crashes.py").write_text("import os\n\n\ndef work(*_):\n    os.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)  # workers inherit it
    own, job = Workers(1), media_job(processor, PHOTOS[0])
    try:
        with monkeypatch.context() as crashing, pytest.raises(ValueError, match=r"its name: .* ended its process \(SIGABRT\)"):
            crashing.setattr(
                "serve.multimodal.image_workers._process_in_worker", importlib.import_module("decoder_that_crashes").work
            )
            own.process(job)
        assert caplog.text.count("its image is tried once more") == 1
        assert_equal(own.process(job), process_media(job))
    finally:
        own.pool.close()


def test_a_stopped_worker_is_given_up(monkeypatch, processor):
    monkeypatch.setattr("serve.multimodal.image_workers.SPARE_S", 1)
    own, job = Workers(1, max_image_seconds=1), media_job(processor, PHOTOS[0])
    try:
        own.measure(job)
        (pid,) = own.pool.pool.pids
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ValueError, match="its name: decoding the image took longer than 2 seconds"):
            own.process(job)
    finally:
        own.pool.close()


def test_processor_time_of_an_image_is_bounded(processor):
    """A plain PPM is parsed in Python: 4,000 x 4,000 pixels take seconds."""
    text = b"P3 3000 3000 255\n" + b"1 " * (3 * 3000 * 3000)
    own = Workers(1, max_image_seconds=1)
    try:
        job = media_job(processor, text)
        assert len(own.measure(job).layouts) == 1
        with pytest.raises(ValueError, match="its name: decoding the image took more than 1 seconds of processor time"):
            own.process(job)
    finally:
        own.pool.close()


@pytest.mark.parametrize("end", ["pool.close()", "os.kill(os.getpid(), 9)"])
def test_workers_end_with_their_server(end):
    lines = (
        "import os; from serve.multimodal.image_workers import ImageWorkerPool",
        "pool = ImageWorkerPool(2).pool; jobs = [pool.submit(lambda call: call(abs, 1, cpu_s=9, timeout_s=9)) for _ in range(4)]",
        "[job.future.result() for job in jobs]; print(*pool.pids, flush=True)",
        end,
    )
    code = "if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in lines)
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path, timeout=60)
    pids = done.stdout.split()
    assert len(pids) in (1, 2), done.stderr  # one may have been quick enough for both jobs
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_default_number_of_workers(monkeypatch):
    for cores, workers in ((16, MAX_WORKERS), (5, 2), (1, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        assert default_workers() == workers
    monkeypatch.delattr(os, "memfd_create")
    assert default_workers() == 0
    with pytest.raises(ValueError, match="--picture-processes is 3, which needs Linux"):
        ImageWorkerPool(3)
