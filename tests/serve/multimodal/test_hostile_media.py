"""Hostile media: bounds are checked before work, and no image delays another request's text."""

import asyncio
import base64
import io
import ipaddress
import struct
import threading
import time
from types import SimpleNamespace

import av
import httpx
import numpy as np
import pytest
from PIL import Image

from minicpmv46_jax.processing.images import MAX_JPEG_SCANS
from minicpmv46_jax.processing.video import VideoLimits
from serve.multimodal.image_workers import ImageWorkerPool
from serve.multimodal.media_fetcher import DownloadLimits, MediaFetcher, NetworkPolicy
from tests.fuzz.attack import encoded, long_video
from tests.serve.support import NAME, PATIENCE_S, FakeModel, client, live, serving

LOOPBACK = NetworkPolicy(networks=(ipaddress.ip_network("127.0.0.1/32"),))
CPU_S = 1.0  # of a refusal, in this process


class MediaModel(FakeModel):
    """A fake model with the demo model's prompts and images, which answers "ok"."""

    def __init__(self, demo):
        super().__init__()
        text = SimpleNamespace(max_position_embeddings=8192, vocab_size=demo.config.text.vocab_size)
        self.config, self.detokenizer = SimpleNamespace(text=text), demo.detokenizer
        self.processor, self.plan = demo.processor, demo.plan
        self.say = lambda _: "ok"

    def generate(self, inputs, options):
        yield from FakeModel.generate(self, self._plain(inputs), options)

    def _plain(self, inputs):
        return type(inputs)(np.frombuffer(b"x", np.uint8).astype(np.int32), ())


@pytest.fixture(scope="module")
def workers():
    pool = ImageWorkerPool(2)
    yield pool
    pool.close()


@pytest.fixture
def service(demo, workers, monkeypatch):
    monkeypatch.setattr(workers, "close", lambda: None)  # the module's
    fetcher = MediaFetcher(limits=DownloadLimits(total_s=20), network_policy=LOOPBACK)
    monkeypatch.setattr(demo.processor, "video_limits", VideoLimits(max_frames=36_000, max_seconds=60, max_images=1024))
    with serving(MediaModel(demo), max_waiting=100, media_workers=workers, fetcher=fetcher) as service:
        yield service


def ask(service, *parts, **fields):
    """Returns the status and the body of a request, and the processor time that this process took."""

    async def post():
        async with client(service) as http:
            content = [*parts, {"type": "text", "text": "what is it"}]
            request = {"model": NAME, "messages": [{"role": "user", "content": content}], **fields}
            return await http.post("/v1/chat/completions", json=request)

    before = time.process_time()
    answer = asyncio.run(post())
    return answer.status_code, answer.json(), time.process_time() - before


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


def image_data(content, kind="png"):
    return image(f"data:image/{kind};base64,{base64.b64encode(content).decode()}")


def video_data(content):
    return {"type": "video_url", "video_url": {"url": f"data:video/avi;base64,{base64.b64encode(content).decode()}"}}


def refusal(result, *words):
    status, body, cpu_s = result
    assert status == 400, body
    for word in words:
        assert word in body["error"]["message"], body
    assert cpu_s < CPU_S
    return body["error"]


@pytest.mark.parametrize("most", [1000, 65_536])
def test_a_video_of_a_hundred_years_is_refused_by_its_header(service, most):
    words = (f"{most} frames would be shown", "1024") if most > 1024 else ("the context holds 8192 tokens",)
    error = refusal(ask(service, video_data(long_video()), mm_processor_kwargs={"max_num_frames": most}), *words)
    assert error["param"] in ("messages", "messages[0].content[0]")


def test_a_billion_frames_are_no_option(service):
    error = refusal(
        ask(service, video_data(long_video()), mm_processor_kwargs={"max_num_frames": 10**9}), "1 to 65536", "1000000000"
    )
    assert error["param"] == "mm_processor_kwargs"


def test_a_billion_slices_are_no_option(service):
    error = refusal(ask(service, mm_processor_kwargs={"max_slice_nums": 10**9}), "1 to 4096", "1000000000")
    assert error["param"] == "mm_processor_kwargs"


def test_images_beyond_the_context_are_refused_before_they_are_decoded(service, workers, monkeypatch):
    picture = image_data(encoded(Image.new("1", (9400, 9400)), "PNG"))

    async def never(job):
        raise AssertionError("decoded")

    monkeypatch.setattr(workers, "process", never)
    result = ask(service, picture, picture, picture, mm_processor_kwargs={"max_slice_nums": 4096})
    assert refusal(result, "the context holds 8192 tokens")["code"] == "context_length_exceeded"


def test_a_jpeg_of_many_scans_is_refused_by_its_header(service):
    plain = encoded(Image.new("L", (64, 64)), "JPEG", progressive=True)
    scan = plain.rindex(b"\xff\xda")
    empty = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"  # a scan of all bands of one component
    content = plain[:scan] + empty * (MAX_JPEG_SCANS + 1) + plain[scan:]
    refusal(ask(service, image_data(content, "jpeg")), "scans", f"more than the {MAX_JPEG_SCANS} allowed")
    status, body, _ = ask(service, image_data(plain, "jpeg"))
    assert status == 200, body


def test_an_icon_whose_png_is_larger_than_its_directory_says(service):
    png = encoded(Image.new("1", (12_000, 12_000)), "PNG")
    content = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png
    refusal(ask(service, image_data(content, "x-icon")), "12000x12000 = 144000000 pixels")


def test_a_frame_larger_than_its_container_says(service):
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as container:
        stream = container.add_stream("png", rate=1)
        stream.width = stream.height = 2000
        stream.pix_fmt = "gray"
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.zeros((2000, 2000), np.uint8), format="gray")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    content = bytearray(file.getvalue())
    struct.pack_into(">HH", content, content.index(b"png ", content.index(b"stsd")) + 28, 16, 16)
    service.model.processor.max_pixels, before = 10_000, service.model.processor.max_pixels
    try:
        refusal(ask(service, video_data(bytes(content))))
    finally:
        service.model.processor.max_pixels = before


@pytest.mark.parametrize("characters, words", [(20_000_000, "20000"), (1_000_000, "more than 8192 tokens")])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"])
def test_text_is_refused_before_it_is_tokenised_whole(service, path, characters, words):
    text = "word " * (characters // 5)
    fields = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/completions": {"prompt": text},
        "/v1/messages": {"messages": [{"role": "user", "content": text}], "max_tokens": 5},
        "/v1/responses": {"input": text},
    }[path]

    async def post():
        async with client(service) as http:
            return await http.post(path, json={"model": NAME, **fields})

    before = time.process_time()
    answer = asyncio.run(post())
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text[:300]
    assert time.process_time() - before < 2 * CPU_S  # the client's share is in it


class _Drip(threading.Thread):
    """A site that sends a byte every half second to each connection."""

    def __init__(self):
        super().__init__(daemon=True)
        self.open, self.address = 0, ""
        self._ready = threading.Event()
        self.start()
        assert self._ready.wait(PATIENCE_S)

    def run(self):
        asyncio.run(self._serve())

    async def _serve(self):
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/picture.png"
        self._ready.set()
        await server.serve_forever()

    async def _answer(self, reader, writer):
        self.open += 1
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not reader.at_eof():
                writer.write(b".")
                await writer.drain()
                await asyncio.sleep(0.05)
        except OSError:
            pass
        finally:
            self.open -= 1


def test_slow_urls_delay_no_text_and_end_with_their_clients(service):
    site = _Drip()
    with live(service) as address, httpx.Client(timeout=PATIENCE_S) as http:
        slow = threading.Thread(target=lambda: asyncio.run(_leave_after(address, site, 80)))
        slow.start()
        _until(lambda: site.open >= 64)  # all that may be under way at once
        for _ in range(3):
            begun = time.monotonic()
            body = {"model": NAME, "messages": [{"role": "user", "content": "hello"}]}
            assert http.post(f"{address}/v1/chat/completions", json=body).status_code == 200
            assert time.monotonic() - begun < 5
        slow.join(PATIENCE_S)
        _until(lambda: site.open == 0)
    _until(lambda: service.engine.num_reserved == 0)


async def _leave_after(address, site, number):
    """Sends requests with slow URLs, and disconnects before they are answered."""

    async def one(http):
        content = [image(site.address)]
        await http.post(
            f"{address}/v1/chat/completions", json={"model": NAME, "messages": [{"role": "user", "content": content}]}
        )

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=6, limits=limits) as http:
        await asyncio.gather(*(one(http) for _ in range(number)), return_exceptions=True)


def _until(true):
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_stopping_server_gives_up_requests_in_preparation(service):
    site = _Drip()

    async def run():
        async with client(service) as http:
            request = {"model": NAME, "messages": [{"role": "user", "content": [image(site.address)]}]}
            waiting = asyncio.create_task(http.post("/v1/chat/completions", json=request))
            while not site.open:
                await asyncio.sleep(0.02)
            service.stop()
            return await waiting

    answer = asyncio.run(run())
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"


def test_decoded_images_of_all_requests_are_bounded(service, monkeypatch):
    """Each request waits until the one before has given back its pixels."""
    picture = image_data(encoded(Image.new("RGB", (500, 500)), "PNG"))
    held, most = service._pixels, []
    held.limit = 2_000_000  # one image and no more
    release = held.release
    monkeypatch.setattr(held, "release", lambda amount: (most.append(held.used), release(amount)))

    async def run():
        async with client(service) as http:
            request = {"model": NAME, "messages": [{"role": "user", "content": [picture]}]}
            return await asyncio.gather(*(http.post("/v1/chat/completions", json=request) for _ in range(6)))

    assert [answer.status_code for answer in asyncio.run(run())] == [200] * 6
    assert 1_000_000 < max(most) <= 2_000_000 and held.used == 0


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/", "http://127.0.0.1:0/"])
def test_a_port_that_does_not_exist(service, url):
    refusal(ask(service, image(url)), "the port is")


@pytest.mark.parametrize("source", [5, [], ["x"], True])
def test_a_source_that_is_no_text(service, source):
    refusal(ask(service, {"type": "image", "image": source}), "expected a URL of the image")
