"""Utility routes, the OpenAPI document, API keys, CORS and the log."""

import asyncio
import base64
import io
import json
import logging

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image

from serve.api import create_app
from serve.api.common.service import Cors
from serve.runtime import budget, logs
from tests.serve.support import CONTEXT, NAME, FakeModel, ask, body, client, serving


def get(service, path, **headers):
    async def scenario():
        async with client(service) as http:
            return await http.get(path, headers=headers)

    return asyncio.run(scenario())


def post(service, path, **fields):
    return ask(service, content=json.dumps(fields), path=path)


def test_model_names(model):
    with serving(model, aliases=("org/other", "gpt-4o")) as service:
        assert [entry["id"] for entry in get(service, "/v1/models").json()["data"]] == [NAME, "org/other", "gpt-4o"]
        for name in (NAME, "org/other"):
            found = get(service, f"/v1/models/{name}").json()
            assert (found["id"], found["root"], found["max_model_len"]) == (name, NAME, CONTEXT)
        assert ask(service, model="org/other").json()["model"] == NAME
        assert post(service, "/v1/completions", model="org/other", prompt="Hi", max_tokens=1).json()["model"] == NAME
        refused = get(service, "/v1/models/none")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_ready_while_requests_are_accepted(model):
    with serving(model, max_waiting=0) as service:
        assert (get(service, "/ready").status_code, get(service, "/ready").json()) == (200, {"status": "ready"})

        async def while_full():
            async with client(service) as http:
                job = service.engine.reserve()
                found = await http.get("/ready"), await http.get("/health")
                job.close()
                return found

        ready, health = asyncio.run(while_full())
        assert (ready.status_code, ready.json(), health.status_code) == (503, {"status": "full"}, 200)
        service.engine.close()
        assert (get(service, "/ready").status_code, get(service, "/ready").json()) == (503, {"status": "stopped"})


def test_version(service):
    import minicpmv46_jax

    assert get(service, "/version").json() == {"version": minicpmv46_jax.__version__}


def test_tokenize_and_detokenize(service):
    found = post(service, "/tokenize", prompt="hello", return_token_strs=True).json()
    assert found == {"count": 5, "max_model_len": CONTEXT, "tokens": list(b"hello"), "token_strs": list("hello"), "media": []}
    messages = [{"role": "user", "content": "hello"}]
    assert post(service, "/tokenize", messages=messages).json()["tokens"] == list(b"hello")
    assert post(service, "/detokenize", tokens=list(b"hello")).json() == {"prompt": "hello"}


@pytest.mark.parametrize(
    "path, fields, param, words",
    [
        ("/tokenize", {}, "prompt", "prompt is missing"),
        ("/tokenize", {"prompt": 5}, "prompt", "prompt is 5"),
        ("/tokenize", {"prompt": "x", "promt": 1}, "promt", "not a field"),
        ("/tokenize", {"messages": 5}, "messages", "messages is 5"),
        ("/tokenize", {"messages": []}, "messages", "messages is empty"),
        ("/detokenize", {"tokens": "x"}, "tokens", "tokens is 'x'"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "tokens[0] is -1"),
        ("/detokenize", {"tokens": [1, 256]}, "tokens[1]", "tokens[1] is 256, but the vocabulary has 256 tokens"),
    ],
)
def test_invalid_token_requests(service, path, fields, param, words):
    refused = post(service, path, **fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert words in refused.json()["error"]["message"]


def test_token_routes_refuse_unknown_models(service):
    for path, fields in (("/tokenize", {"prompt": "x"}), ("/tokenize", {"messages": []}), ("/detokenize", {"tokens": []})):
        assert post(service, path, model="other", **fields).status_code == 404


def test_routes_that_need_a_key(model):
    with serving(model, api_keys=("a", "b")) as service:
        for path in ("/health", "/ready", "/version", "/openapi.json", "/docs"):
            assert get(service, path).status_code == 200, path
        for path in ("/tokenize", "/detokenize", "/v1/chat/completions", "/v1/responses", "/v1/messages"):
            assert post(service, path).status_code == 401, path
        assert get(service, "/v1/models", Authorization="Bearer b").status_code == 200
        assert get(service, "/v1/models", **{"x-api-key": "a"}).status_code == 200
        assert get(service, "/v1/models", **{"x-api-key": "c"}).status_code == 401


def test_scene_of_the_demo_model(model):
    with serving(model, demo=True, api_keys=("a",)) as service:
        assert get(service, "/scene").status_code == 401
        offers = [get(service, "/scene", Authorization="Bearer a").json() for _ in range(4)]
    for offer in offers:
        assert offer["question"] and offer["pictures"]
        for picture in offer["pictures"]:
            kind, data = picture.split(",")
            assert kind == "data:image/png;base64"
            assert min(Image.open(io.BytesIO(base64.b64decode(data))).size) >= 100
    assert len({offer["pictures"][0] for offer in offers}) > 1


def test_scene_is_empty_for_other_models(service):
    answered = get(service, "/scene")
    assert (answered.status_code, answered.content) == (204, b"")


def test_cors(model):
    def origin(service, path="/v1/models"):
        return get(service, path, Origin="https://a.example").headers.get("Access-Control-Allow-Origin")

    with serving(model) as service:
        assert origin(service) is None
    with serving(model, cors=Cors(("https://a.example",)), api_keys=("k",)) as service:
        assert origin(service, "/health") == origin(service) == "https://a.example"  # pages can read errors too
        assert get(service, "/health", Origin="https://b.example").headers.get("Access-Control-Allow-Origin") is None


def test_log_has_prompts_only_if_enabled(model, caplog):
    for wanted in (False, True):
        caplog.clear()
        with serving(model, log_prompts=wanted) as service, caplog.at_level("INFO", "serve"):
            ask(service)
        assert ("hello" in caplog.text) == wanted


def test_json_log_lines(capsys):
    logs.configure("json")
    try:
        log = logging.getLogger("serve")
        log.info("two\nlines")
        log.info("%s", "message", extra={"fields": {"request_id": "r", "status": 200}})
        try:
            raise RuntimeError("broken")
        except RuntimeError:
            log.exception("failed")
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    finally:
        log.handlers, log.propagate = [], True
    assert [line.get("message") for line in lines] == ["two\nlines", None, "failed"]
    assert (lines[1]["request_id"], lines[1]["status"], lines[1]["level"]) == ("r", 200, "INFO")
    assert "RuntimeError: broken" in lines[2]["exception"]


def test_openapi_document_describes_every_route(service):
    document = get(service, "/openapi.json").json()
    posts = {path for path, methods in document["paths"].items() if "post" in methods}
    assert all("requestBody" in document["paths"][path]["post"] for path in posts)
    assert {"/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize", "/v1/models/{name}", "/health"} <= set(
        document["paths"]
    )


@pytest.mark.parametrize("examples", [10, pytest.param(200, marks=pytest.mark.full)])
def test_requests_generated_from_the_openapi_document(model, examples):

    model.plan = lambda messages, **options: FakeModel.plan(model, [{"content": "hello"}] if messages else [], **options)
    model.say = lambda text: "ok"
    with serving(model) as service:
        app = create_app(service)
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        statuses = set()
        for operation in schema.get_all_operations():
            operation = operation.ok()

            @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def run(case):
                response = case.call()
                statuses.add(response.status_code)
                assert response.status_code < 500, (case.path, case.body, response.text)
                if response.status_code >= 400:
                    assert response.json()["error"]["message"]

            run()
        assert {200, 400} <= statuses


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("[::1]:8000", 200),
        ("a.example.com", 200),
        ("example.com", 400),
        ("evil.test", 400),
        ("localhost.evil.test", 400),
        ("[::1", 400),
        ("", 400),
    ],
)
def test_only_allowed_hosts_are_answered(model, host, status):
    with serving(model, allowed_hosts=("localhost", "::1", "*.example.com")) as service:
        answer = get(service, "/v1/models", Host=host)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["code"] == "invalid_host"


def test_all_hosts_are_answered_without_the_flag(service):
    assert get(service, "/v1/models", Host="evil.test").status_code == 200


def test_bodies_being_received_are_bounded_together(model, monkeypatch):
    monkeypatch.setattr(budget, "UNCOUNTED_BYTES", 500)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow():
        yield json.dumps(body()).encode().ljust(1400)
        begun.set()
        await go_on.wait()
        yield b" "

    async def scenario():
        async with client(service) as http:
            first = asyncio.create_task(http.post("/v1/chat/completions", content=slow()))
            await begun.wait()
            small = await http.post("/v1/chat/completions", json=body())
            large = await http.post("/v1/chat/completions", content=json.dumps(body()).ljust(700))
            go_on.set()
            return (
                (await first).status_code,
                small.status_code,
                large.status_code,
                await http.post("/v1/chat/completions", content=json.dumps(body()).ljust(700)),
            )

    with serving(model, memory_bytes=2000) as service:
        *statuses, later = asyncio.run(scenario())
    assert statuses == [200, 200, 429] and later.status_code == 200
