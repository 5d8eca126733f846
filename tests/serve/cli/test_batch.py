"""Files of requests: each request is answered exactly once, also after a kill and a restart."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from serve.cli.batch import _parser, completed_ids, main, open_locked, read_requests, run_requests
from tests import ROOT
from tests.serve.support import NAME, FakeModel, body, serving


def line(number, text=None, **fields):
    content = body(text or f"request {number}")
    return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": content, **fields}


def write(path, lines):
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in lines))
    return path


def run(service, requests, path, concurrency=4):
    with open_locked(path) as out:
        left = [request for request in requests if request["custom_id"] not in completed_ids(out)]
        asyncio.run(run_requests(service, left, out, concurrency))
    return left


def answers(path):
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return {item["custom_id"]: item for item in lines}, len(lines)


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
    requests = [line(i) for i in range(4)]
    with serving(FakeModel()) as service:
        run(service, requests[:2], out)
        whole = out.read_bytes()
        out.write_bytes(whole + '{"custom_id": "r2", "résp'.encode())
        left = run(service, requests, out)
        assert [request["custom_id"] for request in left] == ["r2", "r3"]
        assert out.read_bytes().startswith(whole)
        assert run(service, requests, out) == []
    assert set(answers(out)[0]) == {"r0", "r1", "r2", "r3"} and answers(out)[1] == 4


@pytest.mark.parametrize(
    "bad, words",
    [
        ("{", "line 2: not valid JSON"),
        ({"body": {}}, "line 2: expected an object with a custom_id"),
        (line(1, method="GET"), "line 2: method is 'GET'"),
        (line(1, url="/v1/embeddings"), "line 2: url is '/v1/embeddings', expected one of /v1/chat/completions"),
        (line(1, body=5), "line 2: body is int"),
        (line(1, body={"stream": True}), "line 2: body.stream is True"),
        (line(0), "line 2: custom_id 'r0' is line 1's already"),
    ],
)
def test_invalid_requests_are_found_before_any_is_sent(tmp_path, capsys, bad, words):
    path = write(tmp_path / "in.jsonl", [line(0), bad])
    assert main([str(path), str(tmp_path / "out.jsonl")]) == 1
    assert words in capsys.readouterr().err


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
    requests = [line(i) for i in range(3)]

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
