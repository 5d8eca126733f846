"""Formats that cannot be served: each route answers 400 with the client's field, in time, and lives on."""

import asyncio
import time

import pytest

from serve.structured_output.grammar import ConstraintFailed
from serve.structured_output.trial import start_trial_workers
from serve.structured_output.vocabulary import Vocabulary
from tests.serve.support import NAME, FakeModel, ask, body, client, events, serving

CPU_S = 1.0  # of a refusal, in this process


@pytest.fixture(scope="module")
def service():
    model = FakeModel()
    workers = start_trial_workers(Vocabulary.of(model.detokenizer, 256, (0,)))
    with serving(model, trial_workers=workers) as service:
        ask(service, structured_outputs={"choice": ["warm"]})  # builds the vocabulary
        yield service


def chain(number):
    references = {f"r{i}": {"anyOf": [{"$ref": f"#/$defs/r{i + 1}"}, {"type": "null"}]} for i in range(number)}
    return {"$defs": {**references, f"r{number}": {"type": "null"}}, "$ref": "#/$defs/r0"}


NUMBER = {"enum": ["x", -(2**63)]}  # overflows llguidance's stack
SCHEMAS = {"chain of references": chain(1500), "lowest integer": NUMBER, "circle": {"$ref": "#"}}


ROUTES = ["chat", "guided", "tool", "responses", "messages"]
REFUSED = [(route, name) for route in ROUTES for name in ("lowest integer", "circle")]


@pytest.mark.parametrize("route, name", [("chat", "chain of references"), *REFUSED])
def test_a_schema_that_ends_its_compiler(service, route, name):
    schema = SCHEMAS[name]
    user = [{"role": "user", "content": "x"}]
    function = {"name": "f", "parameters": schema}
    path, fields, field = {
        "chat": (
            "/v1/chat/completions",
            body(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}),
            "response_format",
        ),
        "guided": ("/v1/chat/completions", body(guided_json=schema), "guided_json"),
        "tool": (
            "/v1/chat/completions",
            body(tools=[{"type": "function", "function": function}], tool_choice="required"),
            "tool_choice",
        ),
        "responses": (
            "/v1/responses",
            {"model": NAME, "input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
            "text.format",
        ),
        "messages": (
            "/v1/messages",
            {
                "model": NAME,
                "max_tokens": 9,
                "messages": user,
                "tools": [{"name": "f", "input_schema": schema}],
                "tool_choice": {"type": "any"},
            },
            "tool_choice",
        ),
    }[route]

    async def post():
        async with client(service) as http:
            return await http.post(path, json=fields)

    begun = time.process_time()
    answer = asyncio.run(post())
    assert time.process_time() - begun < CPU_S
    if name == "chain of references":  # llguidance compiles it on a large stack
        assert answer.status_code in (200, 400), answer.text
    else:
        assert answer.status_code == 400 and field in answer.json()["error"]["message"], answer.text
    assert ask(service, structured_outputs={"choice": ["alive"]}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_format_that_fails_during_the_answer_is_the_clients_mistake(service, monkeypatch, stream):
    def failing(inputs, options):
        for i, delta in enumerate(FakeModel.generate(service.model, inputs, options)):
            if i == 2:
                raise ConstraintFailed("the grammar cannot be followed: too many states", "response_format")
            yield delta

    monkeypatch.setattr(service.model, "generate", failing)
    answer = ask(service, stream=stream)
    if stream:
        last = events(answer.text)[-1]["error"]
    else:
        assert answer.status_code == 400
        last = answer.json()["error"]
    assert (last["type"], last["param"]) == ("invalid_request_error", "response_format")
    assert "too many states" in last["message"]
