"""Chats on the terminal with a running server: `python -m serve.chat`.

Lines that begin with a slash are commands; `/help` lists them. Ctrl-C stops an answer, Ctrl-D ends the chat.
"""

import argparse
import base64
import contextlib
import json
import mimetypes
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from serve.cli.sse_client import SSELineReader

HELP = """\
/image FILE_OR_URL ...   attach images to the next message
/video FILE_OR_URL ...   attach videos to the next message
/system TEXT             set the system prompt; without a text, remove it
/think on | off          whether the model reasons before it answers
/set NAME VALUE          set a request field, such as temperature 0.5; without a value, use the default
/retry                   generate the last answer again
/new                     start a new conversation
/quit                    leave, as Ctrl-D"""
DIM, RED, RESET = "\033[2m", "\033[31m", "\033[0m"


class ChatError(Exception):
    """An error that is shown to the user in one line."""


class Chat:
    """A conversation with its request fields, attached media and system prompt."""

    def __init__(self, http: httpx.Client, model: str, colours: bool):
        self._http, self._model, self._colours = http, model, colours
        self.messages: list[dict[str, Any]] = []
        self.fields: dict[str, Any] = {}
        self._media: list[dict[str, Any]] = []
        self._system: str | None = None
        self._style = ""

    def handle_line(self, line: str) -> bool:
        """Runs a command or sends a message. Returns whether the chat continues."""
        if not line.startswith("/"):
            self._send(line)
            return True
        command, _, rest = line[1:].partition(" ")
        if command in ("quit", "exit"):
            return False
        action = getattr(self, f"_command_{command}", None)
        if action is None:
            raise ChatError(f"/{command} is not a command; /help lists them")
        action(rest.strip())
        return True

    def _command_help(self, _: str) -> None:
        print(HELP)

    def _command_image(self, rest: str) -> None:
        self._attach("image", rest)

    def _command_video(self, rest: str) -> None:
        self._attach("video", rest)

    def _attach(self, kind: str, rest: str) -> None:
        for source in shlex.split(rest):
            url = source if source.startswith(("http://", "https://")) else data_url(Path(source).expanduser(), kind)
            self._media.append({"type": f"{kind}_url", f"{kind}_url": {"url": url}})
        print(f"{len(self._media)} attached to the next message")

    def _command_system(self, rest: str) -> None:
        self._system = rest or None

    def _command_think(self, rest: str) -> None:
        if rest not in ("on", "off"):
            raise ChatError(f"/think is {rest!r}, expected on or off")
        self.fields["chat_template_kwargs"] = {"enable_thinking": rest == "on"}

    def _command_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not value:
            self.fields.pop(name, None)
            return
        try:
            self.fields[name] = json.loads(value)
        except ValueError:
            self.fields[name] = value

    def _command_new(self, _: str) -> None:
        self.messages, self._media = [], []

    def _command_retry(self, _: str) -> None:
        if len(self.messages) < 2:
            raise ChatError("/retry: there is no answer yet")
        del self.messages[-1]
        self._print_answer()

    def _send(self, text: str) -> None:
        if text.strip():
            content = [*self._media, {"type": "text", "text": text}] if self._media else text
            self.messages.append({"role": "user", "content": content})
            self._media = []
            self._print_answer()

    def _print_answer(self) -> None:
        """Prints an answer while it is generated. A request that fails is removed from the conversation."""
        answer: dict[str, Any] = {"role": "assistant", "content": ""}
        try:
            for delta in self._deltas():
                self._print(delta.get("reasoning_content"), DIM)
                self._print(delta.get("content"), "")
                for call in delta.get("tool_calls", ()):
                    self._print(call["function"].get("name"), DIM)
                    self._print(call["function"].get("arguments"), DIM)
                answer["content"] += delta.get("content") or ""
        except KeyboardInterrupt:
            self._print(" (stopped)", DIM)
        except ChatError:
            del self.messages[-1]
            raise
        finally:
            self._print("\n", "")
        self.messages.append(answer)

    def _deltas(self) -> Iterator[dict[str, Any]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        body = {"model": self._model, "messages": [*system, *self.messages], "stream": True, **self.fields}
        try:
            with self._http.stream("POST", "chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ChatError(error_message(response))
                reader = SSELineReader()
                yield from _parse_events(line for chunk in response.iter_bytes() for line in reader.feed(chunk))
        except httpx.HTTPError as error:
            raise ChatError(f"the connection broke: {error or type(error).__name__}") from None

    def _print(self, text: str | None, style: str) -> None:
        if not text:
            return
        if self._colours and style != self._style:
            print(RESET + style, end="")
            self._style = style
        print(text, end="", flush=True)


def _parse_events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yields the deltas of a stream. Raises ChatError."""
    for line in lines:
        data = line.removeprefix("data: ")
        if not data or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise ChatError(event["error"]["message"])
        if event["choices"]:
            yield event["choices"][0]["delta"]


def data_url(path: Path, kind: str) -> str:
    """Returns a file's content as a data URL. Raises ChatError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ChatError(f"{path}: {error.strerror}") from None
    media_type = mimetypes.guess_type(path.name)[0] or f"{kind}/*"
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def error_message(response: httpx.Response) -> str:
    """Returns the message of an error response, or its status if it has none."""
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {response.status_code}"


def connect(url: str, api_key: str | None) -> tuple[httpx.Client, str]:
    """Returns a client of the server, and the name of its model. Raises ChatError."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    http = httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=httpx.Timeout(5.0, read=None))
    try:
        response = http.get("models", timeout=5.0)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ChatError(f"no server at {url}: {error}; `python -m serve` starts one") from None
    if response.status_code != 200:
        raise ChatError(f"{url}: {error_message(response)}")
    return http, response.json()["data"][0]["id"]


def main(argv: list[str] | None = None) -> int:
    """Chats until Ctrl-D. Returns the exit status: 0, or 1 if no server answers."""
    parser = argparse.ArgumentParser(prog="python -m serve.chat", description="Chat on the terminal with a running server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the API (default: %(default)s)")
    parser.add_argument("--api-key", metavar="KEY", help="if the server needs one")
    args = parser.parse_args(argv)
    colours = sys.stdout.isatty()
    try:
        http, model = connect(args.url, args.api_key)
    except ChatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with contextlib.closing(http):
        print(f"{model}; /help for commands, Ctrl-D to leave")
        read_lines(Chat(http, model, colours), colours)
    return 0


def read_lines(chat: Chat, colours: bool) -> None:
    """Passes input lines to the chat until one of them, or the end of input, ends it."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (gives input() line editing and a history)
    continues = True
    while continues:
        try:
            continues = chat.handle_line(input("> "))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except ChatError as error:
            print(f"{RED}{error}{RESET}" if colours else error)
