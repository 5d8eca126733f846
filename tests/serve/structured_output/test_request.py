"""Structured output over HTTP, with a fake and a real model."""

import json
import random
import re

import openai
import pydantic
import pytest

from tests.serve.support import NAME, ask, content_of, events

OPENED = "<|im_start|>assistant\n<think>\n"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("f", "g")]


def content(service, **fields):
    whole = ask(service, **fields).json()["choices"][0]["message"]["content"]
    assert content_of(events(ask(service, stream=True, **fields).text)) == whole
    return whole


def test_json(service):
    assert isinstance(json.loads(content(service, response_format={"type": "json_object"})), dict)
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
    for fields in ({"response_format": response_format}, {"structured_outputs": {"json": SCHEMA}}, {"guided_json": SCHEMA}):
        assert set(json.loads(content(service, **fields))) == {"name", "age"}


@pytest.mark.parametrize("name", ["structured_outputs", "guided"])
def test_regex_choice_and_grammar(service, name):
    def fields(kind, value):
        return {f"guided_{kind}": value} if name == "guided" else {name: {kind: value}}

    assert re.fullmatch("[a-c]{3}", content(service, **fields("regex", "[a-c]{3}")))
    assert content(service, **fields("choice", ["yes", "no"])) in ("yes", "no")
    assert content(service, **fields("grammar", 'start: "x" "y"')) == "xy"


def test_constraint_begins_after_reasoning(service, model):
    model.opening, model.say = OPENED, lambda _: "Hm, well.</think>zzz"
    message = ask(service, structured_outputs={"choice": ["yes"]}).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, well.", "yes")
    message = ask(service, structured_outputs={"choice": ["yes"]}, thinking_token_budget=2).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm", "yes")


def calls(service, **fields):
    choice = ask(service, tools=TOOLS, **fields).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    return [
        (call["function"]["name"], set(json.loads(call["function"]["arguments"]))) for call in choice["message"]["tool_calls"]
    ]


def test_required_tool_calls(service):
    (made,) = calls(service, tool_choice="required", parallel_tool_calls=False)
    assert made[0] in ("f", "g") and made[1] == {"name", "age"}
    assert calls(service, tool_choice={"type": "function", "function": {"name": "g"}}) == [("g", {"name", "age"})]
    assert all(fields == {"name", "age"} for _, fields in calls(service, tool_choice="required"))


def test_answer_or_tool_call(service, model):
    request_fields = {"response_format": {"type": "json_object"}, "tools": TOOLS}
    model.say = lambda _: '<tool_call>\n{"name": "f", "arguments": {"name": "A", "age": 5}}\n</tool_call>'
    assert ask(service, **request_fields).json()["choices"][0]["finish_reason"] == "tool_calls"
    model.say = lambda _: '{"a": 1}'
    assert ask(service, **request_fields).json()["choices"][0]["message"]["content"] == '{"a": 1}'


def test_every_choice_follows_the_format(service):
    choices = ask(service, n=3, response_format={"type": "json_object"}).json()["choices"]
    assert all(isinstance(json.loads(choice["message"]["content"]), dict) for choice in choices)


class Person(pydantic.BaseModel):
    """The type that `.parse` returns."""

    name: str = pydantic.Field(max_length=5)
    age: int = pydantic.Field(ge=0, le=99)


@pytest.fixture(scope="module")
def http(demo_address):
    return openai.OpenAI(base_url=f"{demo_address}/v1", api_key="none", max_retries=0, timeout=120)


def test_parse_with_random_weights(http):
    messages = [{"role": "user", "content": "Who?"}]
    found = http.chat.completions.parse(model=NAME, messages=messages, response_format=Person, seed=1, max_tokens=200)
    assert isinstance(found.choices[0].message.parsed, Person)
    found = http.responses.parse(model=NAME, input="Who?", text_format=Person, max_output_tokens=200, extra_body={"seed": 2})
    assert isinstance(found.output_parsed, Person)


def random_schema(draw, depth=0):
    """Returns a small schema whose documents are short."""
    kind = draw.choice(["integer", "boolean", "enum", "string", "null", *["object", "array"] * (depth < 2)])
    if kind == "enum":
        return {"enum": draw.sample(["a", "b", 1, None, True], 2)}
    if kind == "string":
        return {"type": "string", "maxLength": draw.randint(0, 4)}
    if kind == "integer":
        return {"type": "integer", "minimum": 0, "maximum": draw.randint(0, 999)}
    if kind == "array":
        return {"type": "array", "items": random_schema(draw, depth + 1), "maxItems": 2}
    if kind == "object":
        names = draw.sample(["x", "y", "long name", 'q"uote'], draw.randint(0, 2))
        properties = {name: random_schema(draw, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": names[:1], "additionalProperties": False}
    return {"type": kind}


def test_random_schemas_with_random_weights(http):
    """Checks 20 schemas; the long test checks 500."""
    check_schemas(http, range(20))


@pytest.mark.full
def test_500_random_schemas(http):
    check_schemas(http, range(500))


def check_schemas(http, seeds):
    import jsonschema_rs

    for seed in seeds:
        schema = random_schema(random.Random(seed))
        response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        messages = [{"role": "user", "content": f"Prompt {seed}"}]
        answer = http.chat.completions.create(
            model=NAME, messages=messages, response_format=response_format, seed=seed, max_tokens=900
        )
        assert answer.choices[0].finish_reason == "stop", schema
        jsonschema_rs.validate(schema, json.loads(answer.choices[0].message.content))
