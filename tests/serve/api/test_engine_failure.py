"""The API over an engine that has ended because of an error."""

import asyncio

import pytest

from tests.serve.support import ask, client, events


@pytest.fixture
def failing(model):
    """The model's engine ends in the third step of the first request."""
    model.fault = SystemExit("the device is lost")


def get(service, path):
    async def scenario():
        async with client(service) as http:
            return await http.get(path)

    return asyncio.run(scenario())


def test_failed_engine_answers_503_with_its_own_code_and_health_names_it(service, failing):
    assert get(service, "/health").json() == {"status": "ok"}
    for answer in (ask(service), ask(service)):  # the request that it worked on, and a later one
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (503, "engine_failed", "server_error")
        assert "shutting down" not in error["message"] and "failed" in error["message"]
    health = get(service, "/health")
    assert (health.status_code, health.json()) == (503, {"status": "failed"})


def test_failed_engine_ends_streams_with_its_own_code(service, failing):
    assert events(ask(service, stream=True).text)[-1]["error"]["code"] == "engine_failed"
