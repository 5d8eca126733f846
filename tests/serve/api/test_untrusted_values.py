"""Values of requests and of the model's output that no JSON, float32 or template can hold, on every route."""

import json
import time

import pytest

from minicpmv46_jax.strict_json import parse_json
from serve.api.common.errors import MAX_MESSAGE, ApiError
from serve.api.common.field_names import MAX_ENTRIES, rename
from serve.api.common.json_encoding import encode_json
from serve.api.common.schema import MAX_CONTAINERS, MAX_VALUES, parse_chat
from serve.api.openai.responses import MAX_ECHOED_BYTES
from serve.api.openai.responses_request import parse_response
from tests.serve.support import NAME, ask, events

ROUTES = {
    "/v1/chat/completions": {"model": NAME, "messages": [{"role": "user", "content": "hello"}]},
    "/v1/completions": {"model": NAME, "prompt": "hello"},
    "/v1/responses": {"model": NAME, "input": "hello"},
    "/v1/messages": {"model": NAME, "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]},
    "/v1/messages/count_tokens": {"model": NAME, "messages": [{"role": "user", "content": "hello"}]},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [104]},
}
GENERATING = list(ROUTES)[:4]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def send(service, path, literal=None, **fields):
    """Sends the route's valid body with more fields, and with `"extra": literal` as raw text."""
    text = json.dumps({**ROUTES[path], **fields})
    return ask(service, text if literal is None else f'{text[:-1]}, "user": {literal}}}', path)


def message_of(answer, status=400):
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    assert len(message) <= MAX_MESSAGE and "\n" not in message
    return message


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "literal, words",
    [
        ("1e999", "the number 1e999 is beyond"),
        ("-1e999", "the number -1e999 is beyond"),
        ("Infinity", "Infinity is not JSON"),
        ("NaN", "NaN is not JSON"),
        ("9" * 5000, "has more than 308 digits"),
        (r'"\ud800"', "half a character"),
        (r'{"\udfff": 1}', "half a character"),
        ("[" * 300 + "]" * 300, "nested too deeply: at most 200"),
        ('{"a":' * 300 + "1" + "}" * 300, "nested too deeply: at most 200"),
        ("[" * 50_000, "nested too deeply"),
        ("[" + "{}," * MAX_CONTAINERS + "{}]", f"brackets and braces, and at most {MAX_CONTAINERS}"),
        ("[" + "0," * MAX_VALUES + "0]", f"at most {MAX_VALUES}"),
    ],
)
def test_bodies_that_cannot_be_used_are_400_on_every_route(service, path, literal, words):
    assert words in message_of(send(service, path, literal))


@pytest.mark.parametrize("path", ROUTES)
def test_raw_surrogate_bytes_are_400_on_every_route(service, path):
    body = json.dumps(ROUTES[path])[:-1].encode() + b', "user": "\xed\xa0\x80"}'
    assert "expected UTF-8" in message_of(ask(service, body, path))


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("value", [1e39, 10**300])
def test_temperature_beyond_float32_is_400(service, path, value):
    assert "temperature is 1e+" in message_of(send(service, path, temperature=value))


@pytest.mark.parametrize("key", ["9" * 5000, "9" * 11])
def test_logit_bias_of_many_digits_is_400(service, key):
    answer = send(service, "/v1/chat/completions", logit_bias={key: 1})
    assert "is not a token id" in message_of(answer) and answer.json()["error"]["param"] == "logit_bias"


@pytest.mark.parametrize("error", [TypeError("odd"), OverflowError("big"), RecursionError(), UnicodeError("half")])
def test_errors_of_a_clients_values_are_400_with_the_field(service, model, error):
    model.plan_fault = error
    answer = ask(service)
    message_of(answer)
    assert answer.json()["error"]["param"] == "messages"
    model.plan_fault = None


@pytest.mark.parametrize("kind", [[], {}, 1, None])
def test_types_of_any_json_type_are_400(service, kind):
    part = [{"role": "user", "content": [{"type": kind}]}]
    message_of(send(service, "/v1/messages", messages=part))
    message_of(send(service, "/v1/messages", tools=[{"name": "f"}], tool_choice={"type": kind or []}))
    message_of(send(service, "/v1/messages", thinking={"type": kind or []}))
    message_of(send(service, "/v1/responses", input=[{"type": kind or [], "role": "user", "content": "x"}]))
    message_of(send(service, "/v1/responses", input=part))
    message_of(send(service, "/v1/responses", include=[kind]))
    message_of(send(service, "/v1/chat/completions", response_format={"type": kind}))


LONG = "x" * 5_000_000


@pytest.mark.parametrize(
    "path, fields",
    [
        ("/v1/chat/completions", {LONG: 1}),
        ("/v1/chat/completions", {"model": LONG}),
        ("/v1/chat/completions", {"temperature": LONG}),
        ("/v1/chat/completions", {"logit_bias": {LONG: 1}}),
        ("/v1/chat/completions", {"stream": True, "stream_options": {LONG: 1}}),
        ("/v1/chat/completions", {"mm_processor_kwargs": {LONG: 1}}),
        ("/v1/chat/completions", {"mm_processor_kwargs": {"downsample_mode": LONG}}),
        ("/v1/chat/completions", {"structured_outputs": {LONG: 1}}),
        ("/v1/chat/completions", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": LONG}}}),
        ("/v1/messages", {"messages": [{"role": LONG, "content": ""}]}),
        ("/v1/responses", {"truncation": LONG}),
        ("/v1/responses", {"input": [{"type": LONG}]}),
        ("/tokenize", {LONG: 1}),
    ],
)
def test_refusals_repeat_little_of_a_value(service, path, fields):
    begun = time.process_time()
    answer = send(service, path, **fields)
    assert time.process_time() - begun < 2  # difflib alone took longer
    message_of(answer, 404 if "model" in fields else 400)
    assert len(answer.content) < 2 * MAX_MESSAGE


def seconds(function, *arguments):
    begun = time.process_time()
    with pytest.raises(ApiError):
        function(*arguments)
    return time.process_time() - begun


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": ["x"] * 15_000},
        {"messages": [], "tools": ["x"] * 15_000},
        {"messages": [], "stop": [1] * 15_000},
        {"messages": [], "stop_token_ids": [-1] * 15_000},
        {"messages": [], "logit_bias": {f"x{i}": 1 for i in range(15_000)}},
        {"messages": [], "stream": True, "stream_options": {f"x{i}": 1 for i in range(15_000)}},
    ],
    ids=lambda fields: list(fields)[-1],
)
def test_many_wrong_entries_are_refused_at_the_first(fields):
    body = json.dumps({"model": NAME, **fields}).encode()
    begun = time.process_time()
    parse_json(body.decode())
    parsing = time.process_time() - begun
    assert seconds(parse_chat, body) < 2 * parsing + 0.1


@pytest.mark.parametrize(
    "path, field, entry",
    [
        ("/v1/chat/completions", "messages", {"role": "user", "content": "x"}),
        ("/v1/messages", "messages", {"role": "user", "content": "x"}),
        ("/v1/responses", "input", {"role": "user", "content": "x"}),
        ("/v1/chat/completions", "tools", TOOL),
    ],
)
def test_lists_beyond_any_context_are_refused_by_their_length(service, path, field, entry):
    answer = send(service, path, **{field: [entry] * 20_000})
    assert f"has 20000 entries, at most {MAX_ENTRIES}" in message_of(answer)
    assert path == "/v1/messages" or answer.json()["error"]["param"] == field


def test_names_are_looked_up_in_the_message_alone():
    names = {"messages": "input", "stop": "stop_sequences", **{f"messages[{i}]": f"input[{i + 1}]" for i in range(100_000)}}
    begun = time.process_time()
    assert (
        rename("messages[5].content[2]: stop or stops, x.stop", names) == "input[6].content[2]: stop_sequences or stops, x.stop"
    )
    assert rename("messages is empty; messages[100000]", names) == "input is empty; input[100000]"
    assert time.process_time() - begun < 0.2


@pytest.mark.parametrize(
    "item",
    [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x" * 100}]},
        {"role": "system", "content": "x" * 100},
    ],
    ids=["reasoning", "system"],
)
def test_many_items_are_joined_once(item):
    body = json.dumps({"model": NAME, "input": [item] * 15_000}).encode()
    begun = time.process_time()
    parse_response(body)
    assert time.process_time() - begun < 3  # joined one by one they took a minute


def test_system_items_are_joined_in_order():
    part = {"type": "input_text", "text": "three"}
    items = [{"role": "system", "content": "two"}, {"role": "developer", "content": [part]}, {"role": "user", "content": "x"}]
    parsed, _ = parse_response(json.dumps({"model": NAME, "instructions": "one", "input": items}).encode())
    assert parsed.request.messages[0] == {"role": "system", "content": "one\n\ntwo\n\nthree"}
    assert len(parsed.request.messages) == 2


def test_echoed_fields_are_bounded(service):
    answer = send(service, "/v1/responses", metadata={"a": "x" * MAX_ECHOED_BYTES})
    assert "metadata is too long" in message_of(answer) and answer.json()["error"]["param"] == "metadata"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_model_writes_with_half_a_character_is_delivered(service, model, stream):
    model.say = lambda _: '<tool_call>{"name": "f", "arguments": {"a": "\\ud800x"}}</tool_call>'
    answer = ask(service, tools=[TOOL], stream=stream)
    assert answer.status_code == 200 and "�x" in answer.text
    if stream:
        assert events(answer.text)[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_model_writes_with_infinity_stays_text(service, model, path, stream):
    model.say = lambda _: '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>'
    tools = {
        "/v1/chat/completions": [TOOL],
        "/v1/responses": [{"type": "function", "name": "f", "parameters": {}}],
        "/v1/messages": [{"name": "f", "input_schema": {}}],
    }
    fields = {"max_tokens": 150} if path == "/v1/messages" else {}
    answer = send(service, path, tools=tools[path], stream=stream, **fields)
    assert answer.status_code == 200 and "error" not in answer.text.replace('"error":null', "")
    if not stream:
        assert "1e999" in answer.text


def test_json_of_responses_replaces_surrogates():
    assert json.loads(encode_json({"a\ud800": ["\udfff", "é"]})) == {"a�": ["�", "é"]}
