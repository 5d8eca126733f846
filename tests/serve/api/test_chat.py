"""Chat completions around a fake model: response objects, options, concurrent requests, keys and the log."""

import asyncio
import base64
import json
import threading

import pytest

from tests.serve.support import (
    CONTEXT,
    NAME,
    ask,
    body,
    client,
    content_of,
    events,
    serving,
)


def test_completion_object(service):
    answer = ask(service)
    assert answer.status_code == 200
    got = answer.json()
    assert got["object"] == "chat.completion" and got["model"] == NAME and got["id"].startswith("chatcmpl-")
    assert got["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "HELLO", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert got["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}


def test_stream_chunks(service):
    answer = ask(service, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert content_of(chunks) == "HELLO"
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert not any(chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1])
    assert not any("usage" in chunk for chunk in chunks)


def test_stream_with_usage(service):
    chunks = events(ask(service, stream=True, stream_options={"include_usage": True}).text)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_end_the_answer(service, name, stream):
    answer = ask(service, stream=stream, **{name: 3})
    choice = events(answer.text)[-1]["choices"][0] if stream else answer.json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert (content_of(events(answer.text)) if stream else choice["message"]["content"]) == "HEL"


def test_logprobs(service):
    expected = {"token": "H", "logprob": -1.0, "bytes": [72]}
    alternatives = [expected, {"token": "I", "logprob": -2.0, "bytes": [73]}]
    content = ask(service, logprobs=True, top_logprobs=2, max_tokens=1).json()["choices"][0]["logprobs"]["content"]
    assert content == [{**expected, "top_logprobs": alternatives}]
    content = ask(service, logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]["content"]
    assert content == [{**expected, "top_logprobs": []}]


def test_streamed_logprobs_equal_those_of_the_whole_answer(service):
    whole = ask(service, logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    chunks = events(ask(service, logprobs=True, top_logprobs=1, stream=True).text)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == whole


def test_prompt_options_reach_the_model(service, model):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    media = {"max_slice_nums": 1, "downsample_mode": "4x", "use_image_id": False, "max_num_frames": 2, "stack_frames": 3}
    fields = {"tools": tools, "chat_template_kwargs": {"enable_thinking": True}, "mm_processor_kwargs": media}
    assert ask(service, **fields).status_code == 200
    expected = {
        "tools": tools,
        "chat_template_kwargs": {"enable_thinking": True},
        "add_generation_prompt": True,
        "continue_final_message": False,
    }
    assert model.calls == [expected | media]


@pytest.mark.parametrize(
    "fields, tools",
    [({"tool_choice": "none"}, False), ({"tool_choice": "auto"}, True), ({}, True), ({"tool_choice": None}, True)],
)
def test_tool_choice_none_leaves_the_tools_out_of_the_prompt(service, model, fields, tools):
    assert ask(service, tools=[{"type": "function", "function": {"name": "f"}}], **fields).status_code == 200
    assert (model.calls[0]["tools"] is not None) == tools


def test_continued_message_adds_no_generation_prompt(service, model):
    assert ask(service, continue_final_message=True).status_code == 200
    assert ask(service, add_generation_prompt=False).status_code == 200
    assert [call["add_generation_prompt"] for call in model.calls] == [False, False]
    assert [call["continue_final_message"] for call in model.calls] == [True, False]


def test_decoding_options_reach_the_model(service, model):
    seen = []
    make = model.options
    model.options = lambda **options: seen.append(options) or make(**options)
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": -4,
        "stop_token_ids": [9],
        "ignore_eos": True,
    }
    assert ask(service, stop="X", max_tokens=4, logit_bias={"7": -5}, **given).status_code == 200
    assert seen == [given | {"stop": ["X"], "max_new_tokens": 4, "logprobs": None, "logit_bias": {7: -5.0}}]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s"},
        {"n": 1, "response_format": {"type": "text"}, "logit_bias": {}, "parallel_tool_calls": True, "reasoning_effort": None},
        {"functions": None, "guided_json": None, "structured_outputs": {"json_object": False}, "anything": None},
    ],
)
def test_fields_that_change_nothing_are_accepted(service, fields):
    assert ask(service, **fields).json()["choices"][0]["message"]["content"] == "HELLO"


@pytest.mark.parametrize("stream", [False, True])
def test_concurrent_requests_get_the_same_answers_as_alone(service, stream):
    texts = [f"request number {i}" for i in range(16)]

    async def all_at_once():
        async with client(service) as http:
            return await asyncio.gather(*(http.post("/v1/chat/completions", json=body(text, stream=stream)) for text in texts))

    for text, answer in zip(texts, asyncio.run(all_at_once()), strict=True):
        alone = ask(service, messages=[{"role": "user", "content": text}], stream=stream)
        if stream:
            assert content_of(events(answer.text)) == content_of(events(alone.text)) == text.upper()
        else:
            assert answer.json()["choices"] == alone.json()["choices"]
            assert answer.json()["choices"][0]["message"]["content"] == text.upper()
    assert service.engine.num_reserved == 0


def test_health_and_models_answer_while_the_model_is_busy(service, model):
    model.gate = threading.Semaphore(0)

    async def scenario():
        async with client(service) as http:
            busy = asyncio.create_task(http.post("/v1/chat/completions", json=body("busy")))
            await asyncio.to_thread(model.wait_for, model.started, "busy")
            health, models = await http.get("/health"), await http.get("/v1/models")
            assert not busy.done()
            model.gate.release(100)
            return health, models, await busy

    health, models, answer = asyncio.run(scenario())
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    (entry,) = models.json()["data"]
    assert (entry["id"], entry["object"], entry["max_model_len"]) == (NAME, "model", CONTEXT)
    assert answer.json()["choices"][0]["message"]["content"] == "BUSY"


def test_health_and_models_answer_while_a_request_is_prepared(service, model):
    entered, leave = threading.Event(), threading.Event()
    prepare = model.plan

    def slow(messages, **options):
        entered.set()
        assert leave.wait(20)
        return prepare(messages, **options)

    model.plan = slow

    async def scenario():
        async with client(service) as http:
            busy = asyncio.create_task(http.post("/v1/chat/completions", json=body()))
            assert await asyncio.to_thread(entered.wait, 20)
            status = (await http.get("/health")).status_code
            assert not busy.done()
            leave.set()
            return status, (await busy).status_code

    assert asyncio.run(scenario()) == (200, 200)


def test_health_is_503_after_the_engine_has_stopped(model):
    with serving(model) as service:
        service.engine.close()

        async def get():
            async with client(service) as http:
                return await http.get("/health")

        assert asyncio.run(get()).status_code == 503


@pytest.mark.parametrize("key", ["key-ü", "plain"])
def test_api_keys(model, key):
    def status(header, path="/v1/models"):
        async def get():
            async with client(service) as http:
                return await http.get(path, headers={} if header is None else {"Authorization": header.encode()})

        return asyncio.run(get())

    with serving(model, api_keys=("another", key)) as service:
        assert status(f"Bearer {key}").status_code == 200
        assert status(f"bearer {key}").status_code == 200
        assert status(None, "/health").status_code == 200
        basic = "Basic " + base64.b64encode(key.encode()).decode()
        for header in (None, "Bearer", "Bearer ", f"Bearer {key}x", f"Bearer {key[:-1]}", key, basic):
            refused = status(header)
            assert refused.status_code == 401, header
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert ask(service, content=json.dumps(body())).status_code == 401
    assert model.calls == []  # refused before anything was done


def test_request_ids(service):
    assert ask(service, headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    for odd in ("two words", "a" * 65, ""):
        made = ask(service, headers={"X-Request-Id": odd}).headers["X-Request-Id"]
        assert made != odd and len(made) == 32


def test_log_has_token_counts_and_no_text(service, caplog):
    with caplog.at_level("INFO", "serve"):
        ask(service, headers={"X-Request-Id": "mine-2"})
        ask(service, messages=[])
    good, bad = [record.getMessage() for record in caplog.records if record.name == "serve"]
    assert good.startswith("mine-2 POST '/v1/chat/completions' 200 prompt_tokens=5 completion_tokens=5 seconds=")
    assert " 400 " in bad
    assert "hello" not in caplog.text.lower()
