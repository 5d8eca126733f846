"""Text completions with a fake model and with the small engine, metrics, and the load client."""

import json

import httpx
import numpy as np
import openai
import pytest

from minicpmv46_jax.generation.generate import Token
from minicpmv46_jax.processing import Inputs
from serve.api.openai.completions import CompletionLogprobs
from serve.cli import bench
from tests.serve.engine.small_engine import SMALL_PLAN
from tests.serve.support import NAME, FakeDetokenizer, ask, events, serving

GREEDY = {"model": NAME, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def http(demo_address):
    with httpx.Client(base_url=demo_address, timeout=60) as client:
        yield client


def complete(http, **fields):
    return http.post("/v1/completions", json={**GREEDY, "prompt": "Once", **fields})


@pytest.fixture(scope="module")
def expected(demo):
    """The demo model's greedy continuation of a text, 12 tokens."""
    ids = np.frombuffer(b"Once", np.uint8).astype(np.int32)
    options = demo.options(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    return "".join(delta.text for delta in demo.generate(Inputs(ids, ()), options))


def test_text_and_token_ids_give_the_same_completion(http, expected):
    for prompt in ("Once", list(b"Once")):
        got = complete(http, prompt=prompt, max_tokens=12).json()
        assert got["object"] == "text_completion" and got["id"].startswith("cmpl-") and got["model"] == NAME
        assert got["choices"] == [{"index": 0, "text": expected, "logprobs": None, "finish_reason": "length"}]
        assert got["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}


def test_stream(http, expected):
    chunks = events(complete(http, max_tokens=12, stream=True, stream_options={"include_usage": True}).text)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 12
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == expected
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "length"
    assert "usage" not in chunks[0]
    assert all(chunk["choices"] for chunk in events(complete(http, max_tokens=12, stream=True).text))


def test_default_max_tokens_is_16(http):
    assert complete(http).json()["usage"]["completion_tokens"] == 16


def test_stop_text_ends_the_completion(http, expected):
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
        ({"prompt": "x" * 3000}, 400, "prompt", f"the context holds {SMALL_PLAN.max_model_len} tokens"),
        ({"max_tokens": SMALL_PLAN.max_model_len}, 400, "prompt", "together"),
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens is 0"),
        ({"temperature": -1}, 400, "temperature", "temperature is -1"),
        ({"n": 17}, 400, "n", "less than or equal to 16"),
        ({"best_of": 2}, 400, "best_of", "best_of is 2, but only 1 is served"),
        ({"n": 2, "best_of": 3}, 400, "best_of", "best_of is 3, but only 2 is served"),
        ({"suffix": "end"}, 400, "suffix", "suffix is 'end', but only None is served"),
        ({"logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, 400, "logprobs", "logprobs is True"),
        ({"logit_bias": {"306": 1}}, 400, "logit_bias", "for token 306, but the vocabulary has 306"),
        ({"messages": []}, 400, "messages", "not a field"),
        ({"echo": True}, 400, "echo", "echo is True"),
        ({"max_tokenz": 3}, 400, "max_tokenz", "not a field"),
        ({"model": "other"}, 404, "model", "does not exist"),
    ],
)
def test_invalid_fields_are_refused(http, fields, status, param, words):
    answer = complete(http, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert words in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "JSON array"),
        (b"7", "JSON number"),
        (b'{"prompt": "\\udc00"}', "half a character"),
    ],
)
def test_invalid_bodies_are_refused(http, content, words):
    refused = http.post("/v1/completions", content=content)
    assert refused.status_code == 400 and words in refused.json()["error"]["message"]


def test_choices_have_the_seeds_from_the_requests_on(http):
    def text(seed):
        return complete(http, max_tokens=12, seed=seed, temperature=1.0).json()["choices"][0]["text"]

    found = complete(http, max_tokens=12, seed=5, temperature=1.0, n=3, best_of=3).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert [choice["text"] for choice in found["choices"]] == [text(5), text(6), text(7)]
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 36, "total_tokens": 40}


def test_logprobs_of_a_greedy_completion(demo_address, expected):
    client = openai.OpenAI(base_url=f"{demo_address}/v1", api_key="none", max_retries=0, timeout=60)
    found = client.completions.create(
        model=NAME, prompt="Once", max_tokens=12, temperature=0.0, logprobs=2, extra_body={"ignore_eos": True}
    )
    logprobs = found.choices[0].logprobs
    assert found.choices[0].text == expected
    assert [len(field) for field in (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset)] == [12, 12, 12]
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 2 and top[token] == logprob == max(top.values()) <= 0


def fake(service, **fields):
    """Sends a completion request to a fake model."""
    return ask(service, content=json.dumps({"model": NAME, "prompt": "abc", **fields}), path="/v1/completions")


def test_choices_of_a_fake_model(service, model):
    seeds, generate = [], model.generate
    model.generate = lambda inputs, options: seeds.append(options.seed) or generate(inputs, options)
    found = fake(service, n=3, seed=2**63 - 1).json()
    choice = {"text": "ABC", "logprobs": None, "finish_reason": "stop"}
    assert found["choices"] == [{"index": i, **choice} for i in range(3)]
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
    assert seeds == [2**63 - 1, -(2**63), -(2**63) + 1]


def test_streamed_choices_have_a_chunk_per_step(service):
    chunks = events(fake(service, n=2, stream=True, stream_options={"include_usage": True}).text)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    for index in range(2):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"] and chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == "ABC"
        assert [choice["finish_reason"] for choice in own][-1] == "stop"
        assert all(choice["logprobs"] is None for choice in own)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 6
    assert not any("usage" in chunk for chunk in chunks[:-1])


def test_chunks_without_text_are_sent(service, model):
    model.detokenizer.special = frozenset(b"B")
    generate = model.generate
    model.generate = lambda inputs, options: (
        type(delta)("", delta.tokens, delta.finish_reason) for delta in generate(inputs, options)
    )
    chunks = events(fake(service, n=2, stream=True).text)
    assert all(chunk["choices"][0]["text"] == "" for chunk in chunks)
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {0, 1}


def test_usage_in_every_chunk(service):
    chunks = events(fake(service, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 3


def test_logprobs_format(service):
    assert fake(service, logprobs=1, max_tokens=2).json()["choices"][0]["logprobs"] == {
        "tokens": ["A", "B"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"A": -1.0}, {"B": -1.0}],
        "text_offset": [0, 1],
    }
    top = fake(service, logprobs=2, max_tokens=1).json()["choices"][0]["logprobs"]["top_logprobs"]
    assert top == [{"A": -1.0, "B": -2.0}]
    top = fake(service, logprobs=0, max_tokens=1).json()["choices"][0]["logprobs"]["top_logprobs"]
    assert top == [{"A": -1.0}]  # the sampled token is always there


def test_streamed_logprobs_equal_those_of_the_whole_completion(service):
    choices = fake(service, logprobs=1, n=2).json()["choices"]
    chunks = events(fake(service, logprobs=1, n=2, stream=True).text)
    for index, choice in enumerate(choices):
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        joined = {name: [entry for part in parts if part for entry in part[name]] for name in choice["logprobs"]}
        assert joined == choice["logprobs"]


def test_logprobs_of_tokens_that_are_part_of_a_character():
    logprobs = CompletionLogprobs(FakeDetokenizer())
    first, last = "Ü".encode()
    found = logprobs.add([Token(first, -1.0, ((first, -1.0), (last, float("-inf"))))])
    assert found["tokens"] == ["bytes:\\xc3"]
    assert found["top_logprobs"] == [{"bytes:\\xc3": -1.0, "bytes:\\x9c": -9999.0}]
    found = logprobs.add([Token(last, -1.0), Token(ord("b"), -1.0)])
    assert (found["tokens"], found["text_offset"]) == (["bytes:\\x9c", "b"], [0, 1])


def test_reasoning_tags_and_calls_stay_in_the_text(service, model):
    model.say = lambda _: " <think>a</think>\n<tool_call>"
    text = model.say("")
    assert fake(service, max_tokens=50).json()["choices"][0]["text"] == text
    assert "".join(chunk["choices"][0]["text"] for chunk in events(fake(service, max_tokens=50, stream=True).text)) == text


def test_fields_that_change_nothing_are_accepted(service):
    fields = {"user": "u", "metadata": {}, "echo": False, "suffix": None, "best_of": None, "logprobs": None, "logit_bias": {}}
    assert fake(service, **fields, stream_options={"include_usage": True}).json()["choices"][0]["text"] == "ABC"


def test_options_reach_the_model(service, model):
    seen, make = [], model.options
    model.options = lambda **options: seen.append(options) or make(**options)
    assert fake(service, logprobs=3, logit_bias={"7": -5}, stop="X", seed=4, top_k=2).status_code == 200
    (options,) = seen
    assert (options["logprobs"], options["logit_bias"], options["stop"]) == (3, {7: -5.0}, ["X"])
    assert (options["seed"], options["top_k"], options["max_new_tokens"]) == (4, 2, 16)


def test_more_choices_than_capacity(model):
    with serving(model, max_waiting=1) as service:
        refused = fake(service, n=3)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert service.engine.num_reserved == 0
        assert fake(service, n=2).status_code == 200


def test_metrics_count_completions(http):
    complete(http)
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "\nminicpmv46_answer_tokens_total " in answer.text
    assert "\nminicpmv46_time_to_first_token_seconds_bucket" in answer.text


@pytest.fixture
def sent(monkeypatch):
    """Path and body of each request of the load client."""
    sent, send = [], bench.send_request
    monkeypatch.setattr(
        bench, "send_request", lambda client, path, body: (sent.append((path, body)), send(client, path, body))[1]
    )
    return sent


def run_bench(address, tmp_path, *flags):
    out = tmp_path / "numbers.json"
    pace = [] if "--rate" in flags else ["--concurrency", "3"]
    common = ["--url", address, "--requests", "4", "--warmup", "0", "--ids", "256", "--output", str(out)]
    status = bench.main([*common, *pace, *flags])
    return status, json.loads(out.read_text())


def test_load_client_counts_tokens_and_times(demo_address, tmp_path, capsys):
    status, found = run_bench(demo_address, tmp_path, "--input-len", "5..60", "--output-len", "9")
    assert status == 0 and "output_throughput" in capsys.readouterr().out
    assert (found["successful_requests"], found["failed_requests"]) == (4, 0)
    assert found["total_output_tokens"] == 36 and 20 <= found["total_input_tokens"] <= 240
    assert found["output_throughput"] == pytest.approx(36 / found["duration_s"])
    assert 0 < found["median_ttft_ms"] < found["median_e2e_ms"]
    assert found["mean_e2e_ms"] == pytest.approx(found["mean_ttft_ms"] + 8 * found["mean_tpot_ms"], rel=0.3)
    assert found["settings"]["input_len"] == [5, 60]


def test_load_client_sends_conversations_and_images(demo_address, tmp_path, demo_engine):
    hits = demo_engine.scheduler.cached_tokens
    status, found = run_bench(
        demo_address, tmp_path, "--turns", "2", "--image", "64x48", "--input-len", "20", "--output-len", "4"
    )
    assert status == 0 and found["successful_requests"] == 8 and found["total_output_tokens"] == 32
    assert demo_engine.scheduler.cached_tokens > hits


def test_load_client_draws_its_requests_before_the_first_is_sent(demo_address, tmp_path, monkeypatch, sent):
    before, picture = [], bench._random_image
    monkeypatch.setattr(bench, "_random_image", lambda rng, size: (before.append(len(sent)), picture(rng, size))[1])
    flags = ["--image", "64x48", "--input-len", "2..9", "--output-len", "1..5"]
    assert run_bench(demo_address, tmp_path, *flags)[0] == 0
    assert before == [0] * 4 and len(sent) == 4
    first = sorted(map(str, sent))
    sent.clear()
    run_bench(demo_address, tmp_path, *flags)
    assert sorted(map(str, sent)) == first  # a seed decides the load
    sent.clear()
    run_bench(demo_address, tmp_path, *flags, "--seed", "1")
    assert not set(map(str, sent)) & set(first)


def test_load_client_sends_at_a_rate(demo_address, tmp_path):
    status, found = run_bench(demo_address, tmp_path, "--rate", "4", "--output-len", "3")
    assert status == 0 and found["successful_requests"] == 4


def test_load_client_sends_a_response_format(demo_address, tmp_path, sent):
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


def test_load_client_sends_extra_fields(demo_address, tmp_path, sent):
    extra = ["--temperature", "0.7", "--extra-body", '{"top_p": 0.8, "temperature": 0.9}']
    status, found = run_bench(demo_address, tmp_path, "--output-len", "3", *extra)
    assert status == 0 and found["successful_requests"] == 4
    assert len(sent) == 4
    assert all((body["top_p"], body["temperature"], body["max_tokens"]) == (0.8, 0.9, 3) for _, body in sent)


def test_load_client_reports_failures(demo_address, tmp_path, capsys):
    status, found = run_bench(demo_address, tmp_path, "--model", "other", "--output-len", "3")
    assert status == 1 and found["failed_requests"] == 4
    assert "does not exist here" in capsys.readouterr().err
    assert bench.main(["--url", "http://127.0.0.1:9", "--requests", "1"]) == 1
    assert "http://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    ["--input-len 5..2", "--image 12", "--image 0x5", "--rate 1 --concurrency 2", "--response-format /none", "--extra-body [1]"],
)
def test_load_client_refuses_invalid_flags(flags, capsys):
    with pytest.raises(SystemExit):
        bench.main(flags.split())
    assert "usage: python -m serve.bench" in capsys.readouterr().err
