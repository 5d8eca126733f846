"""Files of requests: each is answered once, also after a kill; a bad line does not stop the others."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from serve.api import Service
from serve.cli import batch
from serve.cli.batch import BatchRequest, EngineGone, _parser, main, open_locked, read_output, read_requests, run_requests
from tests import ROOT
from tests.serve.engine.serial_engine import SerialEngine
from tests.serve.support import NAME, FakeModel, body, serving


def line(number, text=None, **fields):
    content = body(text or f"request {number}")
    return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": content, **fields}


def write(path, lines):
    texts = [item if isinstance(item, (str, bytes)) else json.dumps(item) for item in lines]
    path.write_bytes(b"".join((text if isinstance(text, bytes) else text.encode()) + b"\n" for text in texts))
    return path


def parsed(lines):
    return [BatchRequest(item["custom_id"], item["url"], json.dumps(item["body"]).encode()) for item in lines]


def run(service, requests, path, concurrency=4):
    with open_locked(path) as out:
        answered, _ = read_output(out)
        left = [request for request in requests if request.custom_id not in answered]
        asyncio.run(run_requests(service, left, out, concurrency))
    return left


def output(path):
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def answers(path):
    lines = output(path)
    return {item["custom_id"]: item for item in lines}, len(lines)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command on lines with a fake model; returns its exit status, the output's lines and stderr."""
    models = []

    def service(args):
        models.append(FakeModel())
        return Service(models[-1], SerialEngine(models[-1], 16), NAME)

    monkeypatch.setattr(batch, "build_service", service)

    def run(lines, capsys):
        path = write(tmp_path / "in.jsonl", lines)
        status = main([str(path), str(tmp_path / "out.jsonl")])
        return status, output(tmp_path / "out.jsonl"), capsys.readouterr().err.splitlines()[-1:]

    run.models = models
    return run


def test_every_request_is_answered_once(tmp_path):
    requests = [line(i) for i in range(20)]
    requests.append(line(20, url="/v1/responses", body={"model": NAME, "input": "hello"}))
    requests.append(line(21, url="/v1/messages", body={"model": NAME, "messages": body()["messages"], "max_tokens": 3}))
    requests.append(line(22, body={**body(), "temperature": -1}))
    path = write(tmp_path / "in.jsonl", requests)
    with serving(FakeModel(), max_waiting=2) as service:  # less capacity than requests in flight: some get a 429
        run(service, list(read_requests(path)), tmp_path / "out.jsonl", concurrency=8)
    found, number = answers(tmp_path / "out.jsonl")
    assert number == 23 and set(found) == {f"r{i}" for i in range(23)}
    for i in range(20):
        response = found[f"r{i}"]["response"]
        assert response["status_code"] == 200
        assert response["body"]["choices"][0]["message"]["content"] == f"REQUEST {i}"
    assert found["r20"]["response"]["body"]["object"] == "response"
    assert found["r21"]["response"]["body"]["content"][0]["text"] == "HEL"
    assert found["r22"]["response"]["status_code"] == 400 and found["r22"]["error"] is None


def test_resume_cuts_off_an_incomplete_line(tmp_path):
    out = tmp_path / "out.jsonl"
    requests = parsed(line(i) for i in range(4))
    with serving(FakeModel()) as service:
        run(service, requests[:2], out)
        whole = out.read_bytes()
        out.write_bytes(whole + '{"custom_id": "r2", "ré'.encode()[:-1])  # cut within a character
        left = run(service, requests, out)
        assert [request.custom_id for request in left] == ["r2", "r3"]
        assert out.read_bytes().startswith(whole)
        assert run(service, requests, out) == []
    assert set(answers(out)[0]) == {"r0", "r1", "r2", "r3"} and answers(out)[1] == 4


BAD_LINES = [
    ("{", None, "not valid JSON"),
    (b"\xff\xfe", None, "not valid UTF-8"),
    ("[" * 100_000, None, "nested too deeply"),
    ("5", None, "expected an object with a custom_id"),
    ({"body": {}}, None, "expected an object with a custom_id"),
    ({"custom_id": 5}, None, "custom_id is 5, expected a string"),
    (line(1, custom_id="\ud800"), None, "custom_id is '\\ud800', expected a string of whole characters"),
    (line(1, method="GET"), "r1", "method is 'GET'"),
    (line(1, url="/v1/embeddings"), "r1", "url is '/v1/embeddings', expected one of /v1/chat/completions"),
    (line(1, url=[]), "r1", "url is [], expected one of"),
    (line(1, body=5), "r1", "body is 5, expected an object"),
    (line(1, body={"stream": True}), "r1", "body.stream is True"),
    (line(1, "\ud800"), "r1", "body has half a character in it"),
    (line(1, body={"temperature": float("nan")}), "r1", "not valid JSON"),
    (json.dumps(line(1, body={"temperature": 12345})).replace("12345", "1e999"), "r1", "not valid JSON"),
    (json.dumps(line(1)).replace("request 1", "9" * 5000).replace('"' + "9" * 5000 + '"', "9" * 5000), None, "not valid JSON"),
    (line(0), None, "custom_id 'r0' is line 1's already"),
]


@pytest.mark.parametrize("bad, custom_id, words", BAD_LINES, ids=[words for _, _, words in BAD_LINES])
def test_bad_line_gets_an_error_and_the_others_an_answer(command, capsys, bad, custom_id, words):
    lines = [line(0), bad, line(2)]
    status, found, err = command(lines, capsys)
    assert status == 1 and len(found) == 3
    (wrong,) = [item for item in found if item["error"] is not None]
    assert wrong["custom_id"] == custom_id and wrong["response"] is None
    assert wrong["error"]["message"].startswith(f"line 2: {words}") and "\n" not in wrong["error"]["message"]
    assert err[0].startswith("error: 1 line has no answer") and "line 2: " in err[0]
    assert {item["custom_id"]: item["response"]["status_code"] for item in found if item["response"]} == {"r0": 200, "r2": 200}
    assert command(lines, capsys) == (1, found, err)  # nothing is sent or written again
    assert len(command.models) == 1


def test_corrected_line_is_answered_by_the_next_run(command, capsys):
    command([line(0), line(1, method="GET")], capsys)
    status, found, _ = command([line(0), line(1)], capsys)
    assert status == 0 and [item["custom_id"] for item in found] == ["r1", "r0", "r1"]
    assert found[-1]["response"]["status_code"] == 200


def test_request_that_failed_in_the_server_is_sent_again(command, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(FakeModel, "__init__", faulty(FakeModel.__init__))
        status, found, err = command([line(0)], capsys)
    assert status == 1 and found[0]["response"]["status_code"] == 500
    assert "'r0' failed in the server with status 500" in err[0]
    status, found, _ = command([line(0)], capsys)
    assert status == 0 and [item["response"]["status_code"] for item in found] == [500, 200]


def faulty(init):
    def wrapped(self):
        init(self)
        self.fault = RuntimeError("a fault of the model")

    return wrapped


def test_exception_of_the_application_fails_its_own_request_only(tmp_path, monkeypatch):
    class Transport(httpx.ASGITransport):
        async def handle_async_request(self, request):
            if b"request 1" in await request.aread():
                raise RuntimeError("a fault")
            return await super().handle_async_request(request)

    monkeypatch.setattr(batch.httpx, "ASGITransport", Transport)
    with serving(FakeModel()) as service:
        run(service, parsed(line(i) for i in range(3)), tmp_path / "out.jsonl")
    found, _ = answers(tmp_path / "out.jsonl")
    assert found["r1"]["error"] == {"code": "server_error", "message": "'r1' failed in the server: RuntimeError"}
    assert [found[f"r{i}"]["response"]["status_code"] for i in (0, 2)] == [200, 200]


def test_stopped_engine_ends_the_run(tmp_path):
    start = time.monotonic()
    path = write(tmp_path / "in.jsonl", [line(i) for i in range(100)])
    with serving(FakeModel()) as service:
        service.model.say = lambda text: service.engine.stop() or text.upper() if text == "request 5" else text.upper()
        with pytest.raises(EngineGone, match=r"the engine has stopped .*shutting down.* resumes from here"):
            run(service, list(read_requests(path)), tmp_path / "out.jsonl", concurrency=2)
    assert time.monotonic() - start < 10
    assert answers(tmp_path / "out.jsonl")[1] >= 4  # what was answered before it stopped


def test_stopped_engine_is_one_line_of_the_command(command, tmp_path, capsys, monkeypatch):
    def stopped(args):
        model = FakeModel()
        service = Service(model, SerialEngine(model, 16), NAME)
        service.engine.stop()
        return service

    monkeypatch.setattr(batch, "build_service", stopped)
    status, found, err = command([line(i, url=url) for i, url in enumerate(batch.ROUTES)], capsys)
    assert status == 1 and found == [] and err[0].startswith("error: the engine has stopped (")


def test_half_a_character_in_an_answer_is_replaced(tmp_path):
    with open_locked(tmp_path / "out.jsonl") as out:
        batch.write_line(out, {"custom_id": "r0", "response": {"status_code": 200, "body": "\ud800"}, "error": None})
        assert read_output(out) == ({"r0"}, set())
    assert output(tmp_path / "out.jsonl")[0]["response"]["body"] == "?"


@pytest.mark.parametrize("text", ["{}", "[]", "5", "not JSON", '{"custom_id": "a", "error": 5}'])
def test_output_that_is_none_is_named(tmp_path, capsys, text):
    path, out = write(tmp_path / "in.jsonl", [line(0)]), write(tmp_path / "out.jsonl", [text])
    assert main([str(path), str(out)]) == 1
    assert f"{out}, line 1: not an answer of a batch" in capsys.readouterr().err
    assert out.read_text() == text + "\n"


def test_completed_file_needs_no_model(tmp_path):
    path = write(tmp_path / "in.jsonl", [line(0)])
    write(tmp_path / "out.jsonl", [{"custom_id": "r0"}])
    assert main([str(path), str(tmp_path / "out.jsonl"), "--model", str(tmp_path / "none")]) == 0


def test_second_run_on_the_same_output_is_refused(tmp_path, capsys):
    path, out = write(tmp_path / "in.jsonl", [line(0)]), tmp_path / "out.jsonl"
    with open_locked(out):
        assert main([str(path), str(out)]) == 1
    assert f"{out} is being written by another run" in capsys.readouterr().err


def test_interrupted_run_keeps_completed_answers(tmp_path):
    model, out = FakeModel(), tmp_path / "out.jsonl"
    model.gate = threading.Semaphore(len("request 0"))
    requests = parsed(line(i) for i in range(3))

    async def stopped():
        with open_locked(out) as file:
            task = asyncio.create_task(run_requests(service, requests, file, 1))
            while not out.stat().st_size:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with serving(model) as service:
        asyncio.run(stopped())
        assert answers(out)[1] == 1
        model.gate.release(1000)
        assert len(run(service, requests, out)) == 2
    assert answers(out)[1] == 3


@pytest.mark.full
def test_killed_run_resumes(tmp_path, demo_folder):
    """Kills the real command after its first answers, and starts it again."""
    count = 12
    lines = [line(i, body={**body(), "model": "model", "max_tokens": 8, "temperature": 0}) for i in range(count)]
    path, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "serve.batch", str(path), str(out), "--cpu", "--model", str(demo_folder)]
    command += ["--backend", "reference", "--served-model-name", "model", "--concurrency", "2"]
    command += ["--max-running", "1", "--no-prefix-cache"]  # few programs
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as first:
        end = time.monotonic() + 240
        while (not out.exists() or out.read_bytes().count(b"\n") < 2) and time.monotonic() < end:
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    before = out.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert kept.count(b"\n") >= 2
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, second.stderr
    assert out.read_bytes().startswith(kept)  # no answer is written twice
    found, number = answers(out)
    assert number == count == len(found)
    assert {item["response"]["status_code"] for item in found.values()} == {200}


def test_unknown_flag_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit):
        _parser().parse_args(["a", "b", "--concurency", "5"])
    assert "did you mean --concurrency?" in capsys.readouterr().err
