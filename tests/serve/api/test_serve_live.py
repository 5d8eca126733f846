"""Clients that disconnect from a real server: generation stops, and the next request is served."""

import json
import socket
import threading
from urllib.parse import urlsplit

import httpx
import pytest

from serve.engine.engine_client import RequestHandle
from tests.serve.support import PATIENCE_S, FakeModel, body, live, serving

LONG = "x" * 150


@pytest.fixture
def cancelled(monkeypatch):
    """An event that is set when a request is cancelled, after a disconnect or at its end."""
    event, cancel = threading.Event(), RequestHandle.cancel

    def spy(job):
        cancel(job)
        event.set()

    monkeypatch.setattr(RequestHandle, "cancel", spy)
    return event


@pytest.fixture
def model():
    model = FakeModel()
    model.gate = threading.Semaphore(0)
    return model


@pytest.fixture
def address(model):
    with serving(model, max_waiting=1) as service, live(service) as address:
        yield address
        model.gate = None
        answer = httpx.post(f"{address}/v1/chat/completions", json=body(), timeout=PATIENCE_S)
        assert answer.json()["choices"][0]["message"]["content"] == "HELLO"  # the worker is free
        assert service.engine.num_reserved == 0


def connect(address, **fields):
    """Returns a connection on which a request has been sent."""
    url, content = urlsplit(address), json.dumps(body(**fields)).encode()
    connection = socket.create_connection((url.hostname, url.port), timeout=PATIENCE_S)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def read_until(connection, mark):
    data = b""
    while mark not in data:
        piece = connection.recv(4096)
        assert piece, data
        data += piece
    return data


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_while_generating(address, model, cancelled, stream):
    with connect(address, text=LONG, stream=stream) as connection:
        model.wait_for(model.started, LONG)
        if stream:
            model.gate.release(3)
            assert b"200 OK" in read_until(connection, b'"content":"X')
    assert cancelled.wait(PATIENCE_S)
    assert LONG not in model.ended  # it waits for its next step
    model.gate.release()
    model.wait_for(model.ended, LONG)


def test_disconnect_while_waiting(address, model, cancelled):
    with connect(address, text="first", stream=True) as first:
        model.wait_for(model.started, "first")
        with connect(address, text="second"):
            pass
        assert cancelled.wait(PATIENCE_S)
        model.gate.release(100)
        read_until(first, b"[DONE]")
    assert "second" not in model.started


def test_disconnect_while_preparing(address, model, cancelled):
    entered, leave = threading.Event(), threading.Event()
    prepare = model.plan

    def slow(messages, **options):
        entered.set()
        assert leave.wait(PATIENCE_S)
        return prepare(messages, **options)

    model.plan = slow
    with connect(address, text="gone"):
        assert entered.wait(PATIENCE_S)
    assert cancelled.wait(PATIENCE_S)
    leave.set()
    model.plan = prepare
    model.gate.release(100)
    answer = httpx.post(f"{address}/v1/chat/completions", json=body("next"), timeout=PATIENCE_S)
    assert answer.json()["choices"][0]["message"]["content"] == "NEXT"
    assert "gone" not in model.started


def test_disconnect_in_the_middle_of_a_body(address, model):
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=PATIENCE_S) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n{")
    assert model.calls == []


def test_stream_arrives_during_generation(address, model):
    with connect(address, text="abc", stream=True) as connection:
        for letter in b"AB":
            model.gate.release()
            read_until(connection, b'"content":"%c"' % letter)  # before the next one is decoded
        model.gate.release()
        assert b'"content":"C"' in read_until(connection, b"[DONE]")
