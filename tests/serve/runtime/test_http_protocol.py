"""Bounds of a connection, with raw sockets against the server's own protocol."""

import contextlib
import json
import socket
import threading
import time

import httpx
import pytest

from serve.runtime import http_protocol
from serve.runtime.http_protocol import MAX_HEADER_BYTES, MAX_HEADERS, MAX_PIPELINED
from serve.runtime.server import Server
from tests.serve.support import PATIENCE_S, FakeModel, body, serving

HEAD = b"GET /health HTTP/1.1\r\nHost: h\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\n"


@contextlib.contextmanager
def running(service):
    """Yields the address of the server's own uvicorn server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = Server(service)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@pytest.fixture
def model():
    return FakeModel()


@pytest.fixture
def address(model):
    with serving(model, api_keys=("key",)) as service, running(service) as address:
        yield address
        assert httpx.get(f"http://127.0.0.1:{address[1]}/health").json() == {"status": "ok"}


@contextlib.contextmanager
def connected(address):
    with socket.create_connection(address, timeout=PATIENCE_S) as connection:
        yield connection


def send(connection, data):
    with contextlib.suppress(ConnectionError):  # the server may have refused it already
        connection.sendall(data)


def receive(connection):
    """Returns all bytes until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(2**16):
            found += piece
    return found


def exchange(address, data):
    with connected(address) as connection:
        send(connection, data)
        return receive(connection)


def error_of(response):
    head, _, content = response.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(content)["error"]


def padded(number, name=b"x"):
    return b"%b: %b\r\n" % (name, b"a" * number)


@pytest.mark.parametrize(
    "data",
    [
        HEAD + padded(60 * 2**20) + b"\r\n",
        HEAD + padded(MAX_HEADER_BYTES) + b"\r\n",
        HEAD + padded(MAX_HEADER_BYTES // 50) * 60 + b"\r\n",
        b"GET /" + b"a" * (20 * 2**20) + b" HTTP/1.1\r\nHost: h\r\n\r\n",
        HEAD + padded(1) * MAX_HEADERS + b"\r\n",
        HEAD + padded(1) * 300_000 + b"\r\n",
        b"a" * 100_000,
    ],
    ids=["60 MB", "one", "several", "path", "number", "300,000", "method"],
)
def test_large_headers_are_refused_and_cost_little(address, data):
    begun = time.process_time()
    response = exchange(address, data)
    assert time.process_time() - begun < 1  # 60 MB took 4 s
    status, error = error_of(response)
    assert status == (400 if data[:5] == b"aaaaa" else 431)
    assert status == 400 or (error["code"] == "headers_too_large" and str(MAX_HEADER_BYTES) in error["message"])


def test_headers_up_to_the_bounds_are_served(address):
    close = b"Connection: close\r\n"
    assert exchange(address, HEAD + close + padded(MAX_HEADER_BYTES - 200) + b"\r\n").startswith(b"HTTP/1.1 200")
    assert exchange(address, HEAD + close + padded(1) * (MAX_HEADERS - 2) + b"\r\n").startswith(b"HTTP/1.1 200")


def test_other_requests_are_served_while_a_header_goes_on(address):
    with connected(address) as slow:
        send(slow, HEAD + b"x: ")
        for _ in range(5):
            send(slow, b"a" * 10_000)
            assert httpx.get(f"http://127.0.0.1:{address[1]}/health").status_code == 200
        send(slow, b"\r\nConnection: close\r\n\r\n")
        assert receive(slow).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "rest",
    [b"1;x=" + b"a" * (2**20), b"0\r\n" + padded(2**20) + b"\r\n", b"0\r\n" + padded(1) * 1000 + b"\r\n"],
    ids=["extension", "trailer", "trailers"],
)
def test_large_trailers_and_chunk_extensions_are_refused(address, rest):
    head = POST + b"Authorization: Bearer key\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert error_of(exchange(address, head + b"1\r\n{\r\n" + rest))[0] == 431


def test_a_trailer_does_not_become_a_header(address):
    head = POST + b"Authorization: Bearer key\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    content = json.dumps(body()).encode()
    response = exchange(address, head + b"%x\r\n%b\r\n0\r\nX-Request-Id: mine\r\n\r\n" % (len(content), content))
    assert response.startswith(b"HTTP/1.1 200") and b"mine" not in response


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"GET \xff\xfe HTTP/1.1\r\n\r\n",
        b"CONNECT h:1 HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
    ],
)
def test_invalid_requests_are_refused_with_an_error_object(address, data):
    status, error = error_of(exchange(address, data))
    assert (status, error["code"]) == (400, "invalid_http")


def test_a_refusal_has_the_format_of_its_api(address):
    response = exchange(address, b"POST /v1/messages HTTP/1.1\r\nHost: h\r\n" + padded(MAX_HEADER_BYTES) + b"\r\n")
    assert json.loads(response.partition(b"\r\n\r\n")[2])["type"] == "error"


def test_upgrades_are_answered_over_http(address):
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
    with connected(address) as connection:
        send(connection, HEAD + upgrade)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "data, answer",
    [
        (b"", b""),
        (b"GET /hea", b"HTTP/1.1 408"),
        (HEAD, b"HTTP/1.1 408"),
        (POST + b"Authorization: Bearer key\r\nContent-Length: 1000\r\n\r\n{", b"HTTP/1.1 408"),
        (POST + b"Authorization: Bearer key\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"HTTP/1.1 408"),
        (POST + b"Content-Length: 1000\r\n\r\n{", b"HTTP/1.1 401"),  # the response precedes the body
    ],
    ids=["nothing", "path", "headers", "body", "chunked", "refused"],
)
def test_half_open_connections_are_closed(address, monkeypatch, data, answer):
    for name in ("HEADER_TIMEOUT_S", "BODY_TIMEOUT_S", "LINGER_S"):
        monkeypatch.setattr(http_protocol, name, 0.3)
    begun = time.monotonic()
    response = exchange(address, data)
    assert response.startswith(answer) and bool(response) == bool(answer)
    assert time.monotonic() - begun < PATIENCE_S / 2


@pytest.mark.parametrize(
    "head, drip",
    [(b"", b"\r\n"), (HEAD + b"x: ", b"a"), (POST + b"Authorization: Bearer key\r\nContent-Length: 9999\r\n\r\n", b" ")],
)
def test_dripping_connections_are_closed(address, monkeypatch, head, drip):
    for name in ("HEADER_TIMEOUT_S", "BODY_TIMEOUT_S", "LINGER_S"):
        monkeypatch.setattr(http_protocol, name, 0.5)
    begun = time.monotonic()
    with connected(address) as connection:
        send(connection, head)
        connection.settimeout(0.05)
        closed = False
        while not closed and time.monotonic() - begun < PATIENCE_S:
            send(connection, drip)
            with contextlib.suppress(TimeoutError):
                try:
                    closed = connection.recv(2**16) == b""
                except ConnectionError:
                    closed = True
    assert closed


def test_a_slow_body_that_goes_on_is_served(address, monkeypatch):
    monkeypatch.setattr(http_protocol, "BODY_TIMEOUT_S", 0.3)
    monkeypatch.setattr(http_protocol, "MIN_BODY_BYTES", 10)
    content = json.dumps(body()).encode().ljust(400)
    with connected(address) as connection:
        send(connection, POST + b"Authorization: Bearer key\r\nConnection: close\r\nContent-Length: 400\r\n\r\n")
        for i in range(0, 400, 20):
            send(connection, content[i : i + 20])
            time.sleep(0.05)
        assert receive(connection).startswith(b"HTTP/1.1 200")


def test_a_stream_outlives_the_clocks_of_requests(model, monkeypatch):
    for name in ("HEADER_TIMEOUT_S", "BODY_TIMEOUT_S", "LINGER_S", "WRITE_TIMEOUT_S"):
        monkeypatch.setattr(http_protocol, name, 0.1)
    model.gate = threading.Semaphore(0)
    with serving(model) as service, running(service) as address, connected(address) as connection:
        content = json.dumps(body(stream=True)).encode()
        send(connection, POST + b"Content-Length: %d\r\n\r\n%b" % (len(content), content))
        model.wait_for(model.started, "hello")
        time.sleep(0.5)
        model.gate.release(100)
        found = b""
        while b"[DONE]" not in found:
            found += connection.recv(2**16)
        time.sleep(0.3)
        send(connection, HEAD + b"Connection: close\r\n\r\n")  # the connection is kept alive
        assert b"HTTP/1.1 200" in receive(connection)


def test_pipelined_requests_are_answered_up_to_the_bound(address):
    response = exchange(address, (HEAD + b"\r\n") * 1000)
    assert response.count(b"HTTP/1.1 200") == MAX_PIPELINED + 1
    assert response.count(b"connection: close") == 1


def test_a_client_that_does_not_read_is_disconnected(model, monkeypatch):
    monkeypatch.setattr(http_protocol, "WRITE_TIMEOUT_S", 0.3)
    model.say = lambda _: "x" * 2000
    with serving(model) as service, running(service) as address, connected(address) as connection:
        content = json.dumps(body(stream=True, n=4, logprobs=True, top_logprobs=20)).encode()
        send(connection, POST + b"Content-Length: %d\r\n\r\n%b" % (len(content), content))
        for _ in range(4):
            model.wait_for(model.ended, "hello")
        while service.engine.num_reserved:
            time.sleep(0.05)
        time.sleep(1)
        assert b"[DONE]" not in receive(connection)


def test_new_connections_replace_idle_ones(model, monkeypatch):
    monkeypatch.setattr("serve.runtime.server.descriptors_for_connections", lambda: 3)
    model.gate = threading.Semaphore(0)
    with serving(model) as service, running(service) as address, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connected(address)) for _ in range(2)]
        content = json.dumps(body()).encode()
        for connection in busy:
            send(connection, POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))
        model.wait_for(model.started, "hello")
        while service.engine.num_reserved < 2:
            time.sleep(0.01)
        idle = stack.enter_context(connected(address))
        send(idle, HEAD + b"\r\n")
        assert idle.recv(2**16).startswith(b"HTTP/1.1 200")
        assert exchange(address, HEAD + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert receive(idle) == b""  # closed for the new one
        third = stack.enter_context(connected(address))
        send(third, POST + b"Content-Length: 100\r\n\r\n{")
        time.sleep(0.2)
        status, error = error_of(exchange(address, b""))
        assert (status, error["code"]) == (503, "too_many_connections")
        model.gate.release(100)
        assert all(receive(connection).startswith(b"HTTP/1.1 200") for connection in busy)
