"""Text completions, metrics and the load client, over the small engine on a loopback port."""

import json

import httpx
import numpy as np
import pytest

from minicpmv46_jax.processing import Inputs
from serve.cli import bench
from tests.serve.engine.small_engine import SIZES
from tests.serve.support import NAME, events

GREEDY = {"model": NAME, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def http(demo_address):
    with httpx.Client(base_url=demo_address, timeout=60) as client:
        yield client


def complete(http, **fields):
    return http.post("/v1/completions", json={**GREEDY, "prompt": "Once", **fields})


@pytest.fixture(scope="module")
def expected(demo):
    """The demo's greedy continuation of a text, 12 tokens."""
    ids = np.frombuffer(b"Once", np.uint8).astype(np.int32)
    options = demo.options(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    return "".join(delta.text for delta in demo.generate(Inputs(ids, ()), options))


def test_a_text_and_its_token_ids_go_on_alike(http, expected):
    for prompt in ("Once", list(b"Once")):
        got = complete(http, prompt=prompt, max_tokens=12).json()
        assert got["object"] == "text_completion" and got["id"].startswith("cmpl-") and got["model"] == NAME
        assert got["choices"] == [{"index": 0, "text": expected, "logprobs": None, "finish_reason": "length"}]
        assert got["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}


def test_a_stream(http, expected):
    chunks = events(complete(http, max_tokens=12, stream=True, stream_options={"include_usage": True}).text)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 12
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == expected
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "length"
    assert "usage" not in chunks[0]
    assert all(chunk["choices"] for chunk in events(complete(http, max_tokens=12, stream=True).text))


def test_as_many_tokens_as_openai_says(http):
    assert complete(http).json()["usage"]["completion_tokens"] == 16


def test_a_stop_text(http, expected):
    got = complete(http, max_tokens=12, stop=expected[3:5]).json()["choices"][0]
    assert (got["text"], got["finish_reason"]) == (expected[: expected.find(expected[3:5])], "stop")


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"prompt": ""}, 400, "prompt", "not empty"),
        ({"prompt": []}, 400, "prompt", "not empty"),
        ({"prompt": [5, 10**6]}, 400, "prompt", "token 1000000, but the vocabulary ends at 305"),
        ({"prompt": [5, -1]}, 400, "prompt", "prompt is"),
        ({"prompt": ["a", "b"]}, 400, "prompt", "prompt is"),
        ({"prompt": None}, 400, "prompt", "prompt is missing"),
        ({"prompt": "x" * 3000}, 400, "prompt", f"the context holds {SIZES.longest} tokens"),
        ({"max_tokens": SIZES.longest}, 400, "prompt", "together"),
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens is 0"),
        ({"temperature": -1}, 400, "temperature", "temperature is -1"),
        ({"n": 2}, 400, "n", "n is 2, but only 1 is served"),
        ({"echo": True}, 400, "echo", "echo is True"),
        ({"max_tokenz": 3}, 400, "max_tokenz", "not a field"),
        ({"model": "other"}, 404, "model", "does not exist"),
    ],
)
def test_mistakes(http, fields, status, param, words):
    answer = complete(http, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert words in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7"])
def test_broken_bodies(http, content):
    assert http.post("/v1/completions", content=content).status_code == 400


def test_metrics(http):
    complete(http)
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "\nminicpmv46_answer_tokens_total " in answer.text
    assert "\nminicpmv46_time_to_first_token_seconds_bucket" in answer.text


@pytest.fixture
def sent(monkeypatch):
    """Path and body of each of the load client's requests."""
    sent, send = [], bench.send_request
    monkeypatch.setattr(bench, "ask", lambda client, path, body: (sent.append((path, body)), send(client, path, body))[1])
    return sent


def run_bench(address, tmp_path, *flags):
    out = tmp_path / "numbers.json"
    pace = [] if "--rate" in flags else ["--concurrency", "3"]
    common = ["--url", address, "--requests", "4", "--warmup", "0", "--ids", "256", "--output", str(out)]
    status = bench.main([*common, *pace, *flags])
    return status, json.loads(out.read_text())


def test_the_load_client_counts_what_it_sent(demo_address, tmp_path, capsys):
    status, found = run_bench(demo_address, tmp_path, "--input-len", "5..60", "--output-len", "9")
    assert status == 0 and "output_throughput" in capsys.readouterr().out
    assert (found["successful_requests"], found["failed_requests"]) == (4, 0)
    assert found["total_output_tokens"] == 36 and 20 <= found["total_input_tokens"] <= 240
    assert found["output_throughput"] == pytest.approx(36 / found["duration_s"])
    assert 0 < found["median_ttft_ms"] < found["median_e2e_ms"]
    assert found["mean_e2e_ms"] == pytest.approx(found["mean_ttft_ms"] + 8 * found["mean_tpot_ms"], rel=0.3)
    assert found["settings"]["input_len"] == [5, 60]


def test_the_load_client_has_conversations_and_pictures(demo_address, tmp_path, demo_engine):
    hits = demo_engine.scheduler.cached_tokens
    status, found = run_bench(
        demo_address, tmp_path, "--turns", "2", "--image", "64x48", "--input-len", "20", "--output-len", "4"
    )
    assert status == 0 and found["successful_requests"] == 8 and found["total_output_tokens"] == 32
    assert demo_engine.scheduler.cached_tokens > hits


def test_what_the_load_client_sends_is_drawn_before_the_clock_starts(demo_address, tmp_path, monkeypatch, sent):
    before, picture = [], bench._random_image
    monkeypatch.setattr(bench, "_picture", lambda rng, size: (before.append(len(sent)), picture(rng, size))[1])
    flags = ["--image", "64x48", "--input-len", "2..9", "--output-len", "1..5"]
    assert run_bench(demo_address, tmp_path, *flags)[0] == 0
    assert before == [0] * 4 and len(sent) == 4
    first = sorted(map(str, sent))
    sent.clear()
    run_bench(demo_address, tmp_path, *flags)
    assert sorted(map(str, sent)) == first  # a seed is a load
    sent.clear()
    run_bench(demo_address, tmp_path, *flags, "--seed", "1")
    assert not set(map(str, sent)) & set(first)


def test_the_load_client_keeps_a_rate(demo_address, tmp_path):
    status, found = run_bench(demo_address, tmp_path, "--rate", "4", "--output-len", "3")
    assert status == 0 and found["successful_requests"] == 4


def test_the_load_client_asks_for_a_form(demo_address, tmp_path, sent):
    schema = {"enum": [5, "words", None]}
    (tmp_path / "form.json").write_text(json.dumps(schema))
    flags = ["--response-format", str(tmp_path / "form.json"), "--input-len", "5", "--output-len", "40"]
    status, found = run_bench(demo_address, tmp_path, *flags)
    assert status == 0 and found["successful_requests"] == 4 and found["total_output_tokens"] < 4 * 40
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    assert all((path, body["response_format"]) == ("/v1/chat/completions", form) for path, body in sent)
    (tmp_path / "form.json").write_text(json.dumps(form))
    assert bench._response_format(str(tmp_path / "form.json")) == form
    status, found = run_bench(demo_address, tmp_path, "--chat", "--input-len", "5", "--output-len", "7")
    assert status == 0 and found["total_output_tokens"] == 28


def test_the_load_client_sends_what_else_it_is_given(demo_address, tmp_path, sent):
    extra = ["--temperature", "0.7", "--extra-body", '{"top_p": 0.8, "temperature": 0.9}']
    status, found = run_bench(demo_address, tmp_path, "--output-len", "3", *extra)
    assert status == 0 and found["successful_requests"] == 4
    assert len(sent) == 4
    assert all((body["top_p"], body["temperature"], body["max_tokens"]) == (0.8, 0.9, 3) for _, body in sent)


def test_the_load_client_says_what_failed(demo_address, tmp_path, capsys):
    status, found = run_bench(demo_address, tmp_path, "--model", "other", "--output-len", "3")
    assert status == 1 and found["failed_requests"] == 4
    assert "does not exist here" in capsys.readouterr().err
    assert bench.main(["--url", "http://127.0.0.1:9", "--requests", "1"]) == 1
    assert "http://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    ["--input-len 5..2", "--image 12", "--image 0x5", "--rate 1 --concurrency 2", "--response-format /none", "--extra-body [1]"],
)
def test_the_load_clients_mistakes(flags, capsys):
    with pytest.raises(SystemExit):
        bench.main(flags.split())
    assert "usage: python -m serve.bench" in capsys.readouterr().err
