"""/v1/responses with the openai client: responses, streams, tools, images, reasoning, errors."""

import json

import openai
import pytest
from openai.types.responses import Response

from tests.serve.support import NAME, FakeModel, ask, live, serving

OPENED = "<|im_start|>assistant\n<think>\n"
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"days": {"type": "integer"}}},
    "strict": False,
}
XML = "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"


@pytest.fixture(scope="module")
def model():
    return FakeModel()


@pytest.fixture(scope="module")
def service(model):
    with serving(model) as service:
        yield service


@pytest.fixture(scope="module")
def http(service):
    with live(service) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=20)


@pytest.fixture(autouse=True)
def plain(model):
    model.opening, model.say = "", str.upper
    model.seen = []
    model.plan = lambda messages, **options: (
        model.seen.append(messages),
        FakeModel.plan(model, [{"content": "hello"}], **options),
    )[1]


def test_response(http):
    answer = http.responses.create(model=NAME, input="hello")
    assert (answer.output_text, answer.status, answer.store) == ("HELLO", "completed", False)
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (5, 5, 10)
    short = http.responses.create(model=NAME, input="hello", max_output_tokens=2, temperature=0.5, instructions="Be brief.")
    assert (short.output_text, short.status, short.incomplete_details.reason) == ("HE", "incomplete", "max_output_tokens")
    assert (short.temperature, short.instructions, short.max_output_tokens) == (0.5, "Be brief.", 2)


def test_events_equal_the_whole_response(http, model):
    model.opening, model.say = OPENED, lambda _: f"Hm.</think>I look. {XML}"
    events = list(http.responses.create(model=NAME, input="hello", tools=[TOOL], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == "response.completed" and isinstance(last.response, Response)
    thought, words, call = last.response.output
    assert thought.content[0].text == "Hm." == joined(events, "response.reasoning_text.delta")
    assert words.content[0].text == "I look." == joined(events, "response.output_text.delta")
    assert json.loads(call.arguments) == {"days": 3} and call.name == "weather"
    assert call.arguments == joined(events, "response.function_call_arguments.delta")
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == last.response.output
    added = [event for event in events if event.type == "response.output_item.added"]
    assert [event.output_index for event in added] == [0, 1, 2] and [event.item.id for event in added] == [
        item.id for item in done
    ]
    whole = http.responses.create(model=NAME, input="hello", tools=[TOOL])
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert whole.usage.output_tokens_details.reasoning_tokens > 0


def joined(events, kind):
    return "".join(event.delta for event in events if event.type == kind)


def test_stream_helper_of_the_client(http):
    with http.responses.stream(model=NAME, input="hello") as stream:
        assert stream.get_final_response().output_text == "HELLO"


def test_tool_loop(http, model):
    model.say = lambda _: XML if len(model.seen[-1]) == 1 else "No rain."
    conversation = [{"role": "user", "content": "Will it rain?"}]
    first = http.responses.create(model=NAME, input=conversation, tools=[TOOL], tool_choice="auto")
    (call,) = first.output
    conversation += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "no"}]
    assert http.responses.create(model=NAME, input=conversation, tools=[TOOL]).output_text == "No rain."
    function = {"name": "weather", "arguments": '{"days": 3}'}
    assert model.seen[-1] == [
        {"role": "user", "content": "Will it rain?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "no"},
    ]
    assert model.calls[-1]["tools"] == [{"type": "function", "function": {k: TOOL[k] for k in ("name", "parameters", "strict")}}]


def test_items_are_converted_to_chat_messages(http, model):
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "dev"}]},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:x"}, {"type": "input_text", "text": "what?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "this", "annotations": []}]},
        {"role": "user", "content": "and?"},
    ]
    http.responses.create(
        model=NAME, instructions="ins", input=items, reasoning={"effort": "high"}, include=["reasoning.encrypted_content"]
    )
    assert model.seen[-1] == [
        {"role": "system", "content": "ins\n\ndev"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "this"}], "reasoning_content": "hm"},
        {"role": "user", "content": "and?"},
    ]
    assert model.calls[-1]["chat_template_kwargs"] == {"enable_thinking": True}


REFUSALS = [
    ({"input": None}, "input", "input is missing"),
    ({"input": 5}, "input", "input is 5, expected a list"),
    ({"input": [5]}, "input[0]", "input[0] is 5, expected an object"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "'item_reference'"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type", "'input_file'"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
        "input[0].content[0].image_url",
        "uploaded files",
    ),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no answers"),
    ({"background": True}, "background", "background is True"),
    ({"top_logprobs": 2}, "top_logprobs", "top_logprobs is 2"),
    ({"include": ["message.output_text.logprobs"]}, "include[0]", "expected one of reasoning.encrypted_content"),
    ({"max_tool_calls": 1}, "max_tool_calls", "not a field"),
    ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search'"),
    ({"reasoning": {"effort": "lots"}}, "reasoning.effort", "reasoning.effort is 'lots'"),
    ({"temperature": "hot"}, "temperature", "temperature is 'hot'"),
    ({"n": 2}, "n", "'n' is not a field"),
    ({"messages": []}, "messages", "'messages' is not a field"),
    ({"inputs": 1}, "inputs", "'inputs' is not a field"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields, param, words", REFUSALS)
def test_invalid_fields(service, fields, param, words, stream):
    content = {"model": NAME, "input": "hello", "stream": stream, **fields}
    refused = ask(service, content=json.dumps(content), path="/v1/responses")
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]


def test_errors_name_the_clients_fields(http, model):
    def fault(messages, **_):
        raise ValueError("messages[1].content[0]: not an image")

    model.plan = fault
    with pytest.raises(openai.BadRequestError) as caught:
        http.responses.create(model=NAME, instructions="x", input=[{"role": "user", "content": "hello"}])
    assert caught.value.param == "input[0].content[0]" and "input[0].content[0]: not an image" in caught.value.message


def test_error_in_the_middle_of_a_stream_is_an_event(http, model):
    model.fault = RuntimeError("an internal detail")
    try:
        *_, last = http.responses.create(model=NAME, input="hello", stream=True)
        assert (last.type, last.code) == ("error", "internal_error") and "internal detail" not in last.message
    finally:
        model.fault = None
