"""Image workers: the same slices and errors as in this process, and no process left behind."""

import base64
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from PIL import Image

from minicpmv46_jax.processing import MediaConfig, Processor
from minicpmv46_jax.processing.media_job import MediaJob, process_media
from minicpmv46_jax.processing.video import NO_VIDEO_LIMITS
from serve.multimodal.image_workers import MAX_WORKERS, ImageWorkerPool, default_workers
from tests import ROOT
from tests.minicpmv46_jax.processing.test_images import PHOTOS
from tests.serve.api.test_clients import clip


@pytest.fixture(scope="module")
def image_workers():
    pool = ImageWorkerPool(2)
    yield pool
    pool.close()


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
    found = image_workers(job)
    assert len(found[0].slices) > 1
    assert_equal(found, process_media(job))


def test_videos_are_sliced_as_in_this_process(image_workers, processor):
    job = media_job(processor, clip(6), "video")
    found = image_workers(job)
    assert len(found) > 1
    assert_equal(found, process_media(job))


def test_concurrent_jobs(image_workers, processor):
    jobs = [media_job(processor, path) for path in PHOTOS] * 10
    with ThreadPoolExecutor(8) as pool:
        for found, expected in zip(pool.map(image_workers, jobs), [process_media(job) for job in jobs[:2]] * 10, strict=True):
            assert_equal(found, expected)


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
        with pytest.raises(ValueError) as there:
            image_workers(job)
        assert str(there.value) == str(here.value)


def test_unfetched_url_is_a_bug_and_is_not_fetched(image_workers, processor):
    for media_worker in (process_media, image_workers):
        for kind in ("image", "video"):
            with pytest.raises(AssertionError, match=r"http://127\.0\.0\.1:9/x should have been fetched"):
                media_worker(media_job(processor, "http://127.0.0.1:9/x", kind))


def test_decoded_images_stay_in_this_process(image_workers, processor):
    picture = Image.open(PHOTOS[0])
    assert_equal(image_workers(media_job(processor, picture)), process_media(media_job(processor, picture)))


def test_workers_import_no_jax(image_workers, processor):
    """Importing it would cost each worker seconds and hundreds of megabytes."""
    image_workers(media_job(processor, PHOTOS[0]))
    imported = "[name for name in ('jax', 'transformers', 'fastapi') if name in __import__('sys').modules]"
    assert image_workers._pool.submit(eval, imported).result() == []


def test_results_hold_no_file_descriptors(image_workers, processor):
    """Hundreds of results may wait, and a process may have a thousand descriptors."""
    before = len(os.listdir("/proc/self/fd"))
    found = [image_workers(media_job(processor, PHOTOS[0])) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(found) == 5


def test_dead_worker_is_replaced(processor, caplog):
    own = ImageWorkerPool(1)
    try:
        job = media_job(processor, PHOTOS[0])
        expected = own(job)
        (process,) = own._pool._processes.values()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert_equal(own(job), expected)
        assert "the pool restarts" in caplog.text
    finally:
        own.close()


def test_image_that_always_crashes_its_worker_fails_alone(monkeypatch, tmp_path, processor):
    (tmp_path / "decoder_that_crashes.py").write_text("import os\n\n\ndef work(*_):\n    os.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)  # workers inherit it
    own, job = ImageWorkerPool(1), media_job(processor, PHOTOS[0])
    try:
        with monkeypatch.context() as crashing, pytest.raises(BrokenProcessPool):
            crashing.setattr(
                "serve.multimodal.image_workers._process_in_worker", importlib.import_module("decoder_that_crashes").work
            )
            own(job)
        assert_equal(own(job), process_media(job))
    finally:
        own.close()


@pytest.mark.parametrize("end", ["pool.close()", "os.kill(os.getpid(), 9)"])
def test_workers_end_with_their_server(end):
    lines = (
        "import os; from serve.multimodal.image_workers import ImageWorkerPool",
        "pool = ImageWorkerPool(2); list(pool._pool.map(abs, range(4)))",
        "print(*pool._pool._processes, flush=True)",
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
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    assert (default_workers(True), default_workers(False)) == (MAX_WORKERS, 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(5))
    assert default_workers(True) == 2
    monkeypatch.delattr(os, "memfd_create")
    assert default_workers(True) == 0
    with pytest.raises(ValueError, match="--picture-processes is 3, which needs Linux"):
        ImageWorkerPool(3)
