"""Fuzzers against a server in this process: some seconds each, or MINICPMV46_FUZZ_*'s number of cases."""

import asyncio
import os
import random
import socket
import threading

import pytest

from serve.api import Service
from serve.multimodal.image_workers import ImageWorkerPool
from serve.runtime.server import Server
from serve.structured_output.trial import start_trial_workers
from serve.structured_output.vocabulary import Vocabulary
from tests.fuzz import http, media, schemas
from tests.fuzz.run import Answer, Case, Fuzzer, Report, chunks, parse_answer, send
from tests.serve.support import NAME, PATIENCE_S

SECONDS = 3.0
CPU_PATIENCE_S = 120.0  # the vision tower takes seconds an image on a busy CPU
NUMBERS = {"http": "MINICPMV46_FUZZ_REQUESTS", "media": "MINICPMV46_FUZZ_MEDIA", "schemas": "MINICPMV46_FUZZ_SCHEMAS"}
MAKERS = {"http": http.make, "media": media.make, "schemas": schemas.make}


class ReadyServer(Server):
    """The product's server, with an event for its start."""

    def __init__(self, service):
        super().__init__(service)
        self.ready = threading.Event()

    async def startup(self, sockets=None):
        await super().startup(sockets)
        self.ready.set()


@pytest.fixture(scope="module")
def url(demo, demo_engine):
    """The address of the product's server over the small model."""
    stops = demo.generation_config.stop_token_ids
    trials = start_trial_workers(Vocabulary.of(demo.detokenizer, demo.config.text.vocab_size, stops))
    service = Service(demo, demo_engine, NAME, media_workers=ImageWorkerPool(1), trial_workers=trials)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = ReadyServer(service)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        assert server.ready.wait(PATIENCE_S)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(PATIENCE_S)
    service.media.close()
    trials.close()


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_no_case_harms_the_server(name, url, rng, tmp_path):
    fuzzer = Fuzzer(name, MAKERS[name], url, int(rng.integers(2**32)), os.getpid(), tmp_path, CPU_PATIENCE_S, 4)
    number = os.environ.get(NUMBERS[name])
    report = fuzzer.run(int(number)) if number else fuzzer.run(seconds=SECONDS)
    assert report.sent and not report.findings


def test_valid_examples_are_answered(url):
    fuzzer = Fuzzer("http", http.make, url, 0)
    for case in http.valid(fuzzer.model):
        answer = asyncio.run(send(url, case))
        assert answer.status == 200, (case, answer)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_case_depends_on_seed_and_index_alone(name):
    for index in (0, 1000, 1001):
        first, again = (MAKERS[name](random.Random(f"{name} 1 {index}"), index, "m") for _ in range(2))
        assert first == again and first.encode("h").startswith(first.method.encode())
    assert MAKERS[name](random.Random("a"), 1000, "m") != MAKERS[name](random.Random("b"), 1000, "m")


def test_problems_are_found():
    event = b'data: {"type": "error", "code": "internal_error"}\n\n'
    head = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    answer = parse_answer(head + b"%x\r\n" % len(event) + event + b"\r\n0\r\n\r\n")
    assert answer.problem().startswith("error event")
    assert parse_answer(b"HTTP/1.1 400 Bad\r\n\r\nno").problem() is None
    assert parse_answer(b"HTTP/1.1 503 Gone\r\n\r\nno").problem() == "status 503: b'no'"
    assert (
        Answer(200, {"content-type": "text/event-stream"}, b'data: {"error": {"type": "invalid_request_error"}}').problem()
        is None
    )
    for received in (b"", b"HTTP/1."):
        with pytest.raises(EOFError):
            parse_answer(received)
    with pytest.raises(EOFError):
        list(chunks(b"5\r\nhello\r\n"))


def test_finding_is_written_for_curl(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: listener.accept()[0].close()).start()
        case = Case("POST", "/x", b'{"a": 1}', ((b"X-A", b'"b"'),), "a case")
        fuzzer = Fuzzer("http", lambda *_: case, f"http://127.0.0.1:{listener.getsockname()[1]}", 7, folder=tmp_path)
        fuzzer.__dict__["model"] = "m"
        report = Report()
        asyncio.run(fuzzer._try(3, report))
    (line,) = report.findings
    assert "http seed 7 index 3 (a case): no answer" in line and line.endswith(f"curl --config {tmp_path / 'http-7-3.curl'}")
    config = (tmp_path / "http-7-3.curl").read_text()
    assert 'header = "X-A: \\"b\\""' in config and f'data-binary = "@{tmp_path / "http-7-3.body"}"' in config
    assert (tmp_path / "http-7-3.raw").read_bytes().startswith(b"POST /x HTTP/1.1\r\nHost: ")
