"""Errors: status, OpenAI's error object and the field at fault; the server keeps serving after each."""

import asyncio
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv46_jax.processing import PromptPlan
from serve.api.common.errors import ApiError
from serve.api.common.request_pipeline import generation_kwargs
from serve.api.common.schema import CHAT_FIELDS, SINGLE_VALUE_FIELDS, parse_chat
from tests.serve.support import CONTEXT, NAME, FakeModel, ask, body, client, content_of, events, prompt, serving


@pytest.fixture
def service(model):
    with serving(model) as service:
        yield service
        model.fault = model.plan_fault = model.gate = None
        assert ask(service).json()["choices"][0]["message"]["content"] == "HELLO"  # it still serves
        assert service.engine.num_reserved == 0


def error(answer, status):
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["type"] == {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(
        status, "invalid_request_error"
    )
    assert found["message"] and "\n" not in found["message"]
    assert answer.headers["X-Request-Id"]
    return found


def schema_of(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields, param, words",
    [
        ({"n": 0}, "n", "n is 0"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"n": True}, "n", "n is True"),
        ({"best_of": 2}, "best_of", "best_of is 2, but only 1"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "is None, expected a JSON schema"),
        ({"response_format": schema_of({"type": "objectt"})}, "response_format", "objectt"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "response_format decides where"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "leave one out"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "cannot be compiled"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "is list, expected a list of texts"),
        ({"structured_outputs": {"tag": 1}}, "structured_outputs.tag", "known are json, json_object, regex"),
        ({"guided_json": "x"}, "guided_json", "guided_json is 'x', expected a JSON schema"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar", "cannot be compiled"),
        ({"tools": [FUNCTION], "guided_grammar": 'start: "x"'}, "tool_choice", "cannot be combined with tool calls"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]", "logit_bias[5] is 101.0"),
        ({"logit_bias": {"256": 1}}, "logit_bias", "for token 256, but the vocabulary has 256"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is not a token id"),
        ({"logit_bias": {"5": "much"}}, "logit_bias.5", "logit_bias.5 is 'much'"),
        ({"functions": []}, "functions", "'functions' is not a field"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "parallel_tool_calls is 'no'"),
        ({"reasoning_effort": "lots"}, "reasoning_effort", "'minimal', 'low'"),
        ({"thinking_token_budget": -1}, "thinking_token_budget", "thinking_token_budget is -1"),
        ({"include_reasoning": 1}, "include_reasoning", "include_reasoning is 1"),
        ({"restore_newlines": "yes"}, "restore_newlines", "restore_newlines is 'yes'"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot'"),
        ({"temperature": -1}, "temperature", "temperature is -1.0"),
        ({"temperature": True}, "temperature", "temperature is True"),
        ({"top_p": 0}, "top_p", "top_p is 0.0"),
        ({"top_k": 1.5}, "top_k", "top_k is 1.5"),
        ({"min_p": 2}, "min_p", "min_p is 2.0"),
        ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0.0"),
        ({"presence_penalty": 3}, "presence_penalty", "at most 2.0"),
        ({"seed": "x"}, "seed", "seed is 'x'"),
        ({"seed": 2**64}, "seed", "seed is"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ({"max_tokens": "5"}, "max_tokens", "max_tokens is '5'"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "max_completion_tokens is 6"),
        ({"stop": 5}, "stop", "stop is 5"),
        ({"stop": [""]}, "stop", "at least one character"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "stop_token_ids[0] is -1"),
        ({"stop_token_ids": [2**40]}, "stop_token_ids[0]", "stop_token_ids[0] is"),
        ({"logprobs": 2}, "logprobs", "logprobs is 2"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"messages": "hi"}, "messages", "messages is 'hi'"),
        ({"messages": ["hi"]}, "messages[0]", "messages[0] is 'hi'"),
        ({"messages": []}, "messages", "messages is empty"),
        ({"model": 7}, "model", "model is 7"),
        ({"tools": {}}, "tools", "tools is {}"),
        ({"tools": [{"name": "f"}]}, "tools", "tools[0] must be"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]},
            "tools",
            "must be a JSON schema, got [1]",
        ),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "expected 'none', 'auto', 'required'"),
        ({"tool_choice": "any"}, "tool_choice", "tool_choice is 'any': expected 'none', 'auto'"),
        ({"tool_choice": "required"}, "tool_choice", "'required', but there are no tools"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "names 'g', but"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "chat_template_kwargs is []"),
        ({"mm_processor_kwargs": {"tools": 1}}, "mm_processor_kwargs", "unknown option 'tools'"),
        ({"mm_processor_kwargs": {"max_slice_nums": 0}}, "mm_processor_kwargs", "max_slice_nums must be"),
    ],
)
def test_invalid_fields(service, fields, param, words, stream):
    found = error(ask(service, stream=stream, **fields), 400)
    assert found["param"] == param
    assert words in found["message"]


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag"),
    ],
)
def test_invalid_stream_fields(service, fields, param):
    assert error(ask(service, **fields), 400)["param"] == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(CHAT_FIELDS | set(SINGLE_VALUE_FIELDS))) | st.text(max_size=5), JSON, max_size=4))
def test_random_fields_are_accepted_or_refused_with_400(fields):
    content = json.dumps({**body(), **fields}).encode()
    try:
        request = parse_chat(content)
    except ApiError as refusal:
        assert refusal.status == 400 and refusal.content["error"]["message"]
        return
    try:
        FakeModel().options(**generation_kwargs(request))
    except ValueError as refusal:
        assert str(refusal).partition(" ")[0].partition("[")[0] in CHAT_FIELDS


def test_media_limits(model):
    def content(images, videos):
        parts = [{"type": "image_url", "image_url": {"url": "data:,"}}] * images
        return [*parts, *[{"type": "video_url", "video_url": {"url": "data:,"}}] * videos]

    model.plan = lambda messages, **_: PromptPlan(prompt("hello").token_ids)
    with serving(model, media_limits={"image": 2, "video": 0}) as service:
        first = {"role": "user", "content": content(1, 0)}
        assert ask(service, messages=[first, {"role": "user", "content": content(1, 0)}]).status_code == 200
        found = error(ask(service, messages=[first, {"role": "user", "content": content(2, 0)}]), 400)
        assert found["param"] == "messages[1].content[1]"
        assert "image number 3, but a request may have at most 2 (--limit-mm-per-prompt)" in found["message"]
        found = error(ask(service, messages=[{"role": "user", "content": content(0, 1)}]), 400)
        assert found["param"] == "messages[0].content[0]" and "at most 0" in found["message"]


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_missing_fields(service, missing):
    content = {name: value for name, value in body().items() if name != missing}
    found = error(ask(service, json.dumps(content)), 400)
    assert (found["param"], found["message"]) == (missing, f"{missing} is missing")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[]", "JSON array"),
        (b"3", "JSON number"),
        (b"null", "JSON null"),
        (b'{"temperature": NaN}', "NaN is not JSON"),
        (b"[" * 50_000, "nested too deeply"),
        (b'{"user": "\\udc00"}', "half a character"),
    ],
)
def test_invalid_bodies(service, content, words):
    found = error(ask(service, content), 400)
    assert words in found["message"] and found["param"] is None


def test_bodies_too_deep_for_the_template(service, model):
    def deep(messages, **_):
        raise RecursionError

    ours, model.plan = model.plan, deep
    assert "nested too deeply" in error(ask(service), 400)["message"]
    model.plan = ours
    schema = {}
    for _ in range(900):
        schema = {"type": "array", "items": schema}
    assert ask(service, response_format=schema_of(schema)).status_code in (200, 400)


def test_surrogate_pairs_are_characters(service):
    content = json.dumps(body("smile \U0001f600"))
    assert "\\ud83d" in content
    assert ask(service, content).status_code == 200


def test_unknown_model(service):
    found = error(ask(service, model="gpt-4o"), 404)
    assert (found["param"], found["code"]) == ("model", "model_not_found")
    assert "'gpt-4o'" in found["message"] and repr(NAME) in found["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_context_length(service, model, stream):
    long = [{"role": "user", "content": "x" * CONTEXT}]
    found = error(ask(service, messages=long, stream=stream), 400)
    assert (found["param"], found["code"]) == ("messages", "context_length_exceeded")
    assert f"{CONTEXT} tokens" in found["message"]

    for name in ("max_tokens", "max_completion_tokens"):
        found = error(ask(service, stream=stream, **{name: CONTEXT - 4}), 400)
        assert (found["param"], found["code"]) == (name, "context_length_exceeded")
        assert f"holds {CONTEXT} tokens" in found["message"] and f"{name} is {CONTEXT - 4}" in found["message"]
    assert model.started == []
    assert ask(service, max_tokens=CONTEXT - 5).status_code == 200


def test_unknown_routes_and_methods(service):
    async def scenario():
        async with client(service) as http:
            return await http.get("/v1/nothing"), await http.delete("/v1/models"), await http.get("/v1/chat/completions")

    nothing, delete, get = asyncio.run(scenario())
    assert error(nothing, 404)["code"] == "not_found"
    assert error(delete, 405)["code"] == "method_not_allowed" and delete.headers["Allow"] == "GET"
    assert error(get, 405)["message"] == "GET /v1/chat/completions: Method Not Allowed"


def test_body_too_long(model):
    content = json.dumps(body()).encode()

    async def pieces():
        yield content[:10]
        yield content[10:]

    with serving(model, max_body_bytes=len(content)) as service:
        assert ask(service, content).status_code == 200
        assert ask(service, pieces()).status_code == 200
    with serving(model, max_body_bytes=len(content) - 1) as service:
        assert error(ask(service, content), 413)["code"] == "request_too_large"
        assert error(ask(service, pieces()), 413)["code"] == "request_too_large"  # without a Content-Length


def test_full_queue(model):
    model.gate = threading.Semaphore(0)

    async def scenario():
        async with client(service) as http:
            first = asyncio.create_task(http.post("/v1/chat/completions", json=body("first")))
            await asyncio.to_thread(model.wait_for, model.started, "first")
            refused = await http.post("/v1/chat/completions", json=body("second"))
            model.gate.release(100)
            return refused, await first, await http.post("/v1/chat/completions", json=body("third"))

    with serving(model, max_waiting=0) as service:
        refused, first, third = asyncio.run(scenario())
    assert error(refused, 429)["code"] == "rate_limit_exceeded"
    assert int(refused.headers["Retry-After"]) >= 1
    assert (first.status_code, third.status_code) == (200, 200)


def test_stopping_server(model):
    model.gate = threading.Semaphore(1)

    async def scenario():
        async with client(service) as http:
            running = asyncio.create_task(http.post("/v1/chat/completions", json=body("running", stream=True)))
            await asyncio.to_thread(model.wait_for, model.started, "running")
            waiting = asyncio.create_task(http.post("/v1/chat/completions", json=body("waiting")))
            while service.engine.num_reserved < 2:
                await asyncio.sleep(0)
            service.engine.stop()
            model.gate.release()
            return await running, await waiting, await http.post("/v1/chat/completions", json=body("late"))

    with serving(model) as service:
        running, waiting, late = asyncio.run(scenario())
    for answer in (waiting, late):
        assert error(answer, 503)["message"] == "the server is shutting down"
    if running.status_code == 200:  # else it was stopped before the client had seen the first step
        assert events(running.text)[-1]["error"]["code"] == "shutting_down"
    else:
        assert error(running, 503)["code"] == "shutting_down"


@pytest.mark.parametrize("stream", [False, True])
def test_internal_error_while_preparing(service, model, stream, caplog):
    model.plan_fault = RuntimeError("an internal detail")
    answer = ask(service, stream=stream)
    assert "internal detail" not in error(answer, 500)["message"]
    assert "an internal detail" in caplog.text and "Traceback" in caplog.text
    assert answer.headers["X-Request-Id"] in caplog.text


def test_internal_error_while_decoding(service, model, caplog):
    model.fault = RuntimeError("an internal detail")
    error(ask(service), 500)
    assert "an internal detail" in caplog.text and "Traceback" in caplog.text


def test_error_before_a_streams_first_token_has_a_status(service, model):
    def generate(inputs, options):
        raise RuntimeError("at once")
        yield

    ours, model.generate = model.generate, generate
    error(ask(service, stream=True), 500)
    model.generate = ours


def test_error_in_the_middle_of_a_stream_is_an_event(service, model, caplog):
    model.gate, model.fault = threading.Semaphore(2), RuntimeError("an internal detail")

    async def scenario():
        async with client(service) as http:
            asking = asyncio.create_task(http.post("/v1/chat/completions", json=body(stream=True)))
            await asyncio.to_thread(model.wait_for, model.started, "hello")
            model.gate.release()
            return await asking

    chunks = events(asyncio.run(scenario()).text)
    assert content_of(chunks[:-1]) == "HE"
    assert chunks[-1]["error"]["type"] == "server_error"
    assert "internal detail" not in json.dumps(chunks)
    assert "an internal detail" in caplog.text
