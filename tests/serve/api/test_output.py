"""Parsed output of the chat route, whole and streamed: reasoning, tool calls, choices, thinking budget."""

import json

import openai
import pytest

from serve.engine.engine_client import RequestRejected
from tests.serve.support import NAME, ask, content_of, events, live, serving

OPENED = "<|im_start|>assistant\n<think>\n"
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"days": {"type": "integer"}}}},
}
XML = "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
JSON = '<tool_call>{"name": "weather", "arguments": {"days": 3}}</tool_call>'


def set_output(model, text, thinking=False):
    model.opening = OPENED if thinking else ""
    model.say = lambda _: text


def streamed(service, index=0, **fields):
    """Returns (message, finish reason) of one streamed choice, merged as clients do."""
    message = {"role": "assistant", "content": None}
    for chunk in events(ask(service, stream=True, **fields).text):
        for choice in chunk["choices"]:
            if choice["index"] == index:
                _merge(message, choice["delta"])
                reason = choice["finish_reason"]
    return message, reason


def _merge(message, delta):
    for name in ("content", "reasoning_content"):
        if delta.get(name):
            message[name] = (message.get(name) or "") + delta[name]
    for call in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if call["index"] == len(calls):
            assert call["id"].startswith("call_") and call["type"] == "function" and call["function"]["arguments"] == ""
            calls.append({"name": call["function"]["name"], "arguments": ""})
        calls[call["index"]]["arguments"] += call["function"]["arguments"]


def whole(service, **fields):
    """Returns (message, finish reason) of a choice that is not streamed."""
    choice = ask(service, **fields).json()["choices"][0]
    message = {key: value for key, value in choice["message"].items() if key != "refusal"}
    if "tool_calls" in message:
        assert all(call["type"] == "function" for call in message["tool_calls"])
        message["tool_calls"] = [call["function"] for call in message["tool_calls"]]
    return message, choice["finish_reason"]


@pytest.mark.parametrize("get", [whole, streamed])
@pytest.mark.parametrize("call", [XML, JSON])
@pytest.mark.parametrize("thinking", [False, True])
def test_tool_call(service, model, get, call, thinking):
    set_output(model, ("Hm.\n</think>\n\n" if thinking else "") + f"I look.\n\n{call}", thinking)
    message, reason = get(service, tools=[TOOL])
    assert reason == "tool_calls"
    assert message.get("reasoning_content") == ("Hm." if thinking else None)
    assert message["content"] == "I look."
    assert message["tool_calls"] == [{"name": "weather", "arguments": '{"days": 3}'}]


@pytest.mark.parametrize("get", [whole, streamed])
def test_parallel_tool_calls(service, model, get):
    set_output(model, XML + JSON)
    message, reason = get(service, tools=[TOOL])
    assert (len(message["tool_calls"]), message["content"], reason) == (2, None, "tool_calls")
    message, reason = get(service, tools=[TOOL], parallel_tool_calls=False)
    assert (len(message["tool_calls"]), message["content"], reason) == (1, None, "tool_calls")


@pytest.mark.parametrize("get", [whole, streamed])
def test_invalid_call_stays_in_the_content(service, model, get):
    broken = XML.replace("</parameter>", "")
    set_output(model, broken)
    assert get(service, tools=[TOOL]) == ({"role": "assistant", "content": broken}, "stop")
    set_output(model, XML)
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        assert get(service, **fields) == ({"role": "assistant", "content": XML}, "stop")


@pytest.mark.parametrize("get", [whole, streamed])
def test_answer_that_ends_inside_a_call(service, model, get):
    set_output(model, "a" + XML)
    assert get(service, tools=[TOOL], max_tokens=20) == ({"role": "assistant", "content": ("a" + XML)[:20]}, "length")


@pytest.mark.parametrize("get", [whole, streamed])
def test_reasoning(service, model, get):
    set_output(model, "Hm.\n</think>\n\nYes.", thinking=True)
    expected = {"role": "assistant", "content": "Yes."}
    assert get(service) == (expected | {"reasoning_content": "Hm."}, "stop")
    assert get(service, include_reasoning=False) == (expected, "stop")


@pytest.mark.parametrize("get", [whole, streamed])
@pytest.mark.parametrize(
    "budget, reasoning, content",
    [(None, "abcdef", "Yes."), (6, "abcdef", "go on"), (3, "abc", "go on"), (0, "", "go on"), (100, "abcdef", "Yes.")],
)
def test_thinking_budget(service, model, get, budget, reasoning, content):
    model.opening = OPENED
    model.say = lambda text: "go on" if text.endswith("</think>\n\n") else "abcdef</think>Yes."
    message, reason = get(service, thinking_token_budget=budget)
    assert (message.get("reasoning_content", ""), message["content"], reason) == (reasoning, content, "stop")


def test_reasoning_counts_toward_max_tokens(service, model):
    model.opening = OPENED
    model.say = lambda text: "and so on" if text.endswith("</think>\n\n") else "abcdef"
    for max_tokens, content, reasoning in ((3, "", "abc"), (5, "an", "abc"), (2, "", "ab")):
        answer = ask(service, thinking_token_budget=3, max_tokens=max_tokens).json()
        message = answer["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == (content, reasoning)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == max_tokens


@pytest.mark.parametrize("get", [whole, streamed])
@pytest.mark.parametrize("room", range(1, 20))
def test_thinking_budget_that_ends_near_the_context_ends_the_answer(service, model, monkeypatch, get, room):
    """The engine's context is smaller than the model's: `room` tokens more than prompt and reasoning."""
    model.opening = OPENED
    model.say = lambda text: "go on" if text.endswith("</think>\n\n") else "abcdef"
    prompt, closing = len("hello" + OPENED), len("\n</think>\n\n")
    monkeypatch.setattr(type(service.engine), "max_model_len", prompt + 3 + room)
    monkeypatch.setattr(service.engine, "add_request", rejecting(service.engine))
    message, reason = get(service, thinking_token_budget=3)
    assert message["reasoning_content"] == "abc"
    assert (message["content"] or "", reason) == (("", "length") if room <= closing else ("go on", "stop"))


def rejecting(engine):
    """Returns `add_request` with the check of the real engine: a prompt must leave room for a token."""
    add_request = engine.add_request

    def checked(handle, inputs, options, cache_salt):
        if len(inputs.token_ids) >= engine.max_model_len:
            raise RequestRejected("the prompt is too long")
        add_request(handle, inputs, options, cache_salt)

    return checked


def test_logprobs_cover_every_token(service, model):
    set_output(model, f"Hm.</think>{XML}", thinking=True)
    for get in (
        lambda: ask(service, tools=[TOOL], logprobs=True).json()["choices"][0]["logprobs"]["content"],
        lambda: [
            entry
            for chunk in events(ask(service, tools=[TOOL], logprobs=True, stream=True).text)
            for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
        ],
    ):
        assert "".join(entry["token"] for entry in get()) == f"Hm.</think>{XML}"


def test_several_choices(service, model):
    seeds = []
    make = model.generate
    model.generate = lambda inputs, options: seeds.append(options.seed) or make(inputs, options)
    answer = ask(service, n=3, seed=5).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["HELLO"] * 3
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 15, "total_tokens": 20}
    assert seeds == [5, 6, 7]
    chunks = events(ask(service, n=3, stream=True, stream_options={"include_usage": True}).text)
    for index in range(3):
        own = [chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0]["index"] == index]
        assert content_of(own) == "HELLO" and own[-1]["choices"][0]["finish_reason"] == "stop"
        assert own[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["usage"]["completion_tokens"] == 15


def test_more_choices_than_capacity(model):
    with serving(model, max_waiting=1) as service:
        refused = ask(service, n=3)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert service.engine.num_reserved == 0
        assert ask(service, n=2).status_code == 200


def test_usage_in_every_chunk(service):
    chunks = events(ask(service, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 5


def test_restore_newlines(service, model):
    set_output(model, r"one\ntwo `a\nb`")
    assert whole(service)[0]["content"] == r"one\ntwo `a\nb`"
    for get in (whole, streamed):
        assert get(service, restore_newlines=True)[0]["content"] == "one\ntwo `a\\nb`"
    with serving(model, restore_newlines=True) as service:
        assert whole(service)[0]["content"] == "one\ntwo `a\\nb`"
        assert whole(service, restore_newlines=False)[0]["content"] == r"one\ntwo `a\nb`"


@pytest.mark.parametrize(
    "fields, variables",
    [
        ({"reasoning_effort": "high"}, {"enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}),
    ],
)
def test_reasoning_effort_sets_enable_thinking(service, model, fields, variables):
    ask(service, **fields)
    assert model.calls[-1]["chat_template_kwargs"] == variables


def test_developer_role_and_reasoning_field(service, model):
    seen, make = [], model.plan
    model.plan = lambda messages, **options: seen.append(messages) or make(messages, **options)
    messages = [{"role": "developer", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "c"}]
    ask(service, messages=messages)
    assert seen[0][0]["role"] == "system" and seen[0][1]["reasoning_content"] == "c"


def test_tool_loop_with_the_openai_client(service, model):
    model.say = lambda text: XML if text == "Will it rain?" else "It will not."
    with live(service) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": "Will it rain?"}]
        answer = client.chat.completions.create(model=NAME, messages=messages, tools=[TOOL]).choices[0]
        (call,) = answer.message.tool_calls
        assert (answer.finish_reason, call.function.name, json.loads(call.function.arguments)) == (
            "tool_calls",
            "weather",
            {"days": 3},
        )
        messages += [answer.message, {"role": "tool", "tool_call_id": call.id, "content": "no"}]
        last = client.chat.completions.create(model=NAME, messages=messages, tools=[TOOL])
        assert last.choices[0].message.content == "It will not."


def test_parsed_call_renders_as_the_model_wrote_it(demo):
    """A parsed call is rendered into the next prompt as the model wrote it."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 3}'}}
    messages = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    inputs = demo.process([*messages, {"role": "tool", "tool_call_id": "call_1", "content": "no"}], tools=[TOOL])
    text = demo.detokenizer.decode(inputs.token_ids.tolist(), skip_special_tokens=False)
    assert XML in text and "<tool_response>\nno\n</tool_response>" in text
