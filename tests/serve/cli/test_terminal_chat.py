"""The chat on the terminal, against a real server."""

import builtins

import pytest

from serve.cli.chat import main
from tests.serve.support import FakeModel, live, serving

OPENED = "<|im_start|>assistant\n<think>\n"


@pytest.fixture
def model():
    model = FakeModel()
    model.seen = []
    model.plan = lambda messages, **options: (
        model.seen.append(messages),
        FakeModel.plan(model, [{"content": "hello"}], **options),
    )[1]
    return model


@pytest.fixture
def address(model):
    with serving(model, api_keys=("k",)) as service, live(service) as address:
        yield f"{address}/v1"


def type_lines(monkeypatch, *lines):
    """Makes input() return these lines, and then end."""
    waiting = iter(lines)

    def read(_):
        line = next(waiting, EOFError)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)


def test_conversation_with_retry_and_new(address, model, monkeypatch, capsys):
    type_lines(monkeypatch, "one", "", "two", "/retry", "/new", "three")
    assert main(["--url", address, "--api-key", "k"]) == 0
    assert capsys.readouterr().out.count("HELLO\n") == 4
    roles = [[message["role"] for message in messages] for messages in model.seen]
    assert roles == [["user"], ["user", "assistant", "user"], ["user", "assistant", "user"], ["user"]]
    assert model.seen[1][1]["content"] == "HELLO"


def test_commands_change_requests(address, model, monkeypatch, capsys, tmp_path):
    (tmp_path / "a b.png").write_bytes(b"hi")
    picture = f'/image "{tmp_path / "a b.png"}" http://a/b.png'
    type_lines(
        monkeypatch,
        "/system Be brief.",
        "/think on",
        "/set max_tokens 2",
        "/set user me",
        picture,
        "what?",
        "/set max_tokens",
        "x",
    )
    assert main(["--url", address, "--api-key", "k"]) == 0
    out = capsys.readouterr().out
    assert "2 attached" in out and "HE\n" in out and "HELLO\n" in out
    system, user = model.seen[0]
    assert system == {"role": "system", "content": "Be brief."}
    urls = [part["image_url"]["url"] for part in user["content"][:2]]
    assert urls == ["data:image/png;base64,aGk=", "http://a/b.png"]
    assert model.calls[0]["chat_template_kwargs"] == {"enable_thinking": True}
    assert model.seen[1][-1]["content"] == "x"  # images are sent with one message


def test_errors_are_one_line_and_the_chat_continues(address, model, monkeypatch, capsys):
    type_lines(
        monkeypatch, "/nothing", "/think maybe", "/image none.png", "/retry", "/set temperature -1", "a", "/set temperature", "b"
    )
    assert main(["--url", address, "--api-key", "k"]) == 0
    out = capsys.readouterr().out
    for words in (
        "/nothing is not a command",
        "/think is 'maybe'",
        "none.png: No such file",
        "no answer yet",
        "temperature is -1.0, expected at least 0.0",
    ):
        assert words in out
    assert len(model.seen) == 1 and model.seen[0][0]["content"] == "b"


def test_reasoning_is_printed(address, model, monkeypatch, capsys):
    model.opening, model.say = OPENED, lambda _: "Hm.</think>Yes."
    type_lines(monkeypatch, "/help", "a")
    assert main(["--url", address, "--api-key", "k"]) == 0
    assert "Hm.Yes." in capsys.readouterr().out


def test_missing_server_and_missing_key(capsys, address):
    assert main(["--url", "http://127.0.0.1:9/v1"]) == 1
    assert "error: no server at http://127.0.0.1:9/v1" in capsys.readouterr().err
    assert main(["--url", address]) == 1
    assert "a valid API key is needed" in capsys.readouterr().err
