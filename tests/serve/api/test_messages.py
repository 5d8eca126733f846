"""Anthropic's /v1/messages with its own client: messages, streams, tools, images, thinking, errors."""

import json

import anthropic
import pytest

from tests.serve.support import NAME, FakeModel, ask, live, serving

OPENED = "<|im_start|>assistant\n<think>\n"
TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"days": {"type": "integer"}}}}
XML = "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
HELLO = [{"role": "user", "content": "hello"}]
ASK = {"model": NAME, "max_tokens": 150, "messages": HELLO}


@pytest.fixture(scope="module")
def model():
    return FakeModel()


@pytest.fixture(scope="module")
def service(model):
    with serving(model, api_keys=("secret",)) as service:
        yield service


@pytest.fixture(scope="module")
def http(service):
    with live(service) as address:
        yield anthropic.Anthropic(base_url=address, api_key="secret", max_retries=0, timeout=20)


@pytest.fixture(autouse=True)
def plain(model):
    model.opening, model.say = "", str.upper
    model.seen = []
    model.plan = lambda messages, **options: (
        model.seen.append(messages),
        FakeModel.plan(model, [{"content": "hello"}], **options),
    )[1]


def test_message(http):
    answer = http.messages.create(**ASK)
    assert [(block.type, block.text) for block in answer.content] == [("text", "HELLO")]
    assert (answer.role, answer.model, answer.stop_reason, answer.stop_sequence) == ("assistant", NAME, "end_turn", None)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 5)
    assert http.messages.create(**{**ASK, "max_tokens": 2}).stop_reason == "max_tokens"


def test_stop_sequence_is_reported(http, model):
    tokens = FakeModel.generate

    def stopping(inputs, options):  # like the library: text ends before the stop text, tokens after it
        for delta in tokens(model, inputs, options):
            yield type(delta)("" if delta.text == "L" else delta.text, delta.tokens, "stop" if delta.text == "L" else None)
            if delta.text == "L":
                return

    model.generate = stopping
    try:
        answer = http.messages.create(**ASK, stop_sequences=["O", "L"])
        assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("HE", "stop_sequence", "L")
    finally:
        del model.generate


def test_events_equal_the_whole_message(http, model):
    model.opening, model.say = OPENED, lambda _: f"Hm.</think>I look. {XML}"
    with http.messages.stream(**ASK, tools=[TOOL]) as stream:
        events = list(stream)
        streamed = stream.get_final_message()
    whole = http.messages.create(**ASK, tools=[TOOL])
    for answer in (streamed, whole):
        thought, words, call = answer.content
        assert (thought.thinking, words.text) == ("Hm.", "I look.")
        assert (call.type, call.name, call.input, answer.stop_reason) == ("tool_use", "weather", {"days": 3}, "tool_use")
    assert streamed.usage == whole.usage
    raw = [event.type for event in events if event.type.startswith(("message_", "content_block_st"))]
    assert raw == ["message_start", *["content_block_start", "content_block_stop"] * 3, "message_delta", "message_stop"]


def test_tool_loop(http, model):
    model.say = lambda _: XML if len(model.seen[-1]) == 1 else "No rain."
    messages = [{"role": "user", "content": "Will it rain?"}]
    first = http.messages.create(**{**ASK, "messages": messages}, tools=[TOOL])
    result = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": [{"type": "text", "text": "no"}]}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    assert http.messages.create(**{**ASK, "messages": messages}, tools=[TOOL]).content[0].text == "No rain."
    call = {"id": first.content[0].id, "type": "function", "function": {"name": "weather", "arguments": '{"days": 3}'}}
    assert model.seen[-1] == [
        {"role": "user", "content": "Will it rain?"},
        {"role": "assistant", "content": [], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": first.content[0].id, "content": [{"type": "text", "text": "no"}]},
    ]


def test_blocks_are_converted_to_chat_messages(http, model):
    source = {"type": "base64", "media_type": "image/png", "data": "aGk="}
    messages = [
        {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "what?"}]},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "this"}],
        },
        {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://a/b.png"}}]},
    ]
    system = [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "brief."}]
    http.messages.create(**{**ASK, "messages": messages}, system=system, thinking={"type": "enabled", "budget_tokens": 1024})
    assert model.seen[-1] == [
        {"role": "system", "content": "Be\n\nbrief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
                {"type": "text", "text": "what?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "this"}], "reasoning_content": "hm"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]},
    ]
    assert model.calls[-1]["chat_template_kwargs"] == {"enable_thinking": True}
    http.messages.create(**ASK, thinking={"type": "disabled"}, tools=[TOOL], tool_choice={"type": "none"})
    assert model.calls[-1]["chat_template_kwargs"] == {"enable_thinking": False} and model.calls[-1]["tools"] is None


def test_count_tokens(http, model):
    started = len(model.started)
    assert http.messages.count_tokens(model=NAME, messages=HELLO).input_tokens == 5
    assert len(model.started) == started  # nothing was generated


REFUSALS = [
    ({"max_tokens": None}, "max_tokens is missing"),
    ({"messages": 5}, "messages is 5, expected a list"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role is 'system'"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type is 'document'"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]}, "source.type is 'file'"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].source is None"),
    ({"system": 5}, "system is 5"),
    ({"stop_sequences": "x"}, "stop_sequences is 'x'"),
    ({"stop_sequences": [""]}, "stop_sequences is"),
    ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type is 'web_search_20250305'"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type is 'some'"),
    ({"thinking": {"type": "maybe"}}, "thinking.type is 'maybe'"),
    ({"temperature": -1}, "temperature is -1"),
    ({"n": 2}, "'n' is not a field"),
    ({"topk": 2}, "'topk' is not a field that this server serves; did you mean 'top_k'?"),
]


def post(service, path="/v1/messages", key="secret", **fields):
    return ask(service, content=json.dumps({**ASK, **fields}), path=path, headers={"x-api-key": key})


@pytest.mark.parametrize("fields, words", REFUSALS)
def test_invalid_fields(service, fields, words):
    refused = post(service, **fields)
    assert refused.status_code == 400
    assert refused.json()["type"] == "error" and refused.json()["error"]["type"] == "invalid_request_error"
    assert words in refused.json()["error"]["message"]


def test_other_errors_have_anthropics_format(service, model, http):
    for refused, status, kind in (
        (post(service, key="guess"), 401, "authentication_error"),
        (post(service, model="other"), 404, "not_found_error"),
        (post(service, path="/v1/messages/count_tokens", model="other"), 404, "not_found_error"),
        (post(service, path="/v1/messages/nothing"), 404, "not_found_error"),
    ):
        assert (refused.status_code, refused.json()["error"]["type"]) == (status, kind)
    with pytest.raises(anthropic.NotFoundError):
        http.messages.create(**{**ASK, "model": "other"})
    model.fault = RuntimeError("an internal detail")
    try:
        assert post(service).json()["error"]["type"] == "api_error"
        with pytest.raises(anthropic.APIError), http.messages.stream(**ASK) as stream:
            list(stream)
    finally:
        model.fault = None


def test_errors_name_the_clients_fields(service, model):
    def fault(messages, **_):
        raise ValueError("messages[1].content[0]: not an image")

    model.plan = fault
    message = post(service, system="x").json()["error"]["message"]
    assert message == "messages[0].content[0]: not an image"
