"""A chat on the terminal with a running server: `python -m serve.chat`.

Lines that begin with a slash are commands, `/help` lists them. Ctrl-C ends an answer, Ctrl-D the chat.
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

from serve.cli.sse_client import Lines

HELP = """\
/image FILE_OR_URL ...   send pictures with the next message
/video FILE_OR_URL ...   send videos with it
/system TEXT             the system prompt; without a text, none
/think on | off          whether the model thinks first
/set NAME VALUE          a field of requests, such as temperature 0.5; without a value, the server's own
/retry                   ask for the last answer again
/new                     start anew
/quit                    leave, as Ctrl-D"""
DIM, RED, PLAIN = "\033[2m", "\033[31m", "\033[0m"


class Mistake(Exception):
    """What the user is told in one line."""


class Chat:
    """A conversation, and how it is asked for."""

    def __init__(self, http: httpx.Client, model: str, colours: bool):
        self._http, self._model, self._colours = http, model, colours
        self.messages: list[dict[str, Any]] = []
        self.fields: dict[str, Any] = {}
        self._media: list[dict[str, Any]] = []
        self._system: str | None = None
        self._style = ""

    def line(self, line: str) -> bool:
        """Does what a line says. Returns whether the chat goes on."""
        if not line.startswith("/"):
            self._say(line)
            return True
        command, _, rest = line[1:].partition(" ")
        if command in ("quit", "exit"):
            return False
        action = getattr(self, f"_do_{command}", None)
        if action is None:
            raise Mistake(f"/{command} is no command; /help lists them")
        action(rest.strip())
        return True

    def _do_help(self, _: str) -> None:
        print(HELP)

    def _do_image(self, rest: str) -> None:
        self._attach("image", rest)

    def _do_video(self, rest: str) -> None:
        self._attach("video", rest)

    def _attach(self, kind: str, rest: str) -> None:
        for source in shlex.split(rest):
            url = source if source.startswith(("http://", "https://")) else data_url(Path(source).expanduser(), kind)
            self._media.append({"type": f"{kind}_url", f"{kind}_url": {"url": url}})
        print(f"{len(self._media)} attached to the next message")

    def _do_system(self, rest: str) -> None:
        self._system = rest or None

    def _do_think(self, rest: str) -> None:
        if rest not in ("on", "off"):
            raise Mistake(f"/think is {rest!r}, expected on or off")
        self.fields["chat_template_kwargs"] = {"enable_thinking": rest == "on"}

    def _do_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not value:
            self.fields.pop(name, None)
            return
        try:
            self.fields[name] = json.loads(value)
        except ValueError:
            self.fields[name] = value

    def _do_new(self, _: str) -> None:
        self.messages, self._media = [], []

    def _do_retry(self, _: str) -> None:
        if len(self.messages) < 2:
            raise Mistake("/retry: there is no answer yet")
        del self.messages[-1]
        self._answer()

    def _say(self, text: str) -> None:
        if text.strip():
            content = [*self._media, {"type": "text", "text": text}] if self._media else text
            self.messages.append({"role": "user", "content": content})
            self._media = []
            self._answer()

    def _answer(self) -> None:
        """Prints an answer while it comes; one that is refused takes its question back, so that it can be put otherwise."""
        answer: dict[str, Any] = {"role": "assistant", "content": ""}
        try:
            for delta in self._deltas():
                self._show(delta.get("reasoning_content"), DIM)
                self._show(delta.get("content"), "")
                for call in delta.get("tool_calls", ()):
                    self._show(call["function"].get("name"), DIM)
                    self._show(call["function"].get("arguments"), DIM)
                answer["content"] += delta.get("content") or ""
        except KeyboardInterrupt:
            self._show(" (stopped)", DIM)
        except Mistake:
            del self.messages[-1]
            raise
        finally:
            self._show("\n", "")
        self.messages.append(answer)

    def _deltas(self) -> Iterator[dict[str, Any]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        body = {"model": self._model, "messages": [*system, *self.messages], "stream": True, **self.fields}
        try:
            with self._http.stream("POST", "chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise Mistake(told(answer))
                lines = Lines()
                yield from _events(line for piece in answer.iter_bytes() for line in lines.take(piece))
        except httpx.HTTPError as error:
            raise Mistake(f"the connection broke: {error or type(error).__name__}") from None

    def _show(self, text: str | None, style: str) -> None:
        if not text:
            return
        if self._colours and style != self._style:
            print(PLAIN + style, end="")
            self._style = style
        print(text, end="", flush=True)


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The deltas of a stream."""
    for line in lines:
        data = line.removeprefix("data: ")
        if not data or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise Mistake(event["error"]["message"])
        if event["choices"]:
            yield event["choices"][0]["delta"]


def data_url(path: Path, kind: str) -> str:
    """A file's content as a URL. Raises Mistake."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Mistake(f"{path}: {error.strerror}") from None
    type_ = mimetypes.guess_type(path.name)[0] or f"{kind}/*"
    return f"data:{type_};base64,{base64.b64encode(content).decode()}"


def told(answer: httpx.Response) -> str:
    """What a server says about a refusal."""
    try:
        return answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {answer.status_code}"


def connected(url: str, key: str | None) -> tuple[httpx.Client, str]:
    """A client, and the name of the model there. Raises Mistake."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    http = httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=httpx.Timeout(5.0, read=None))
    try:
        answer = http.get("models", timeout=5.0)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Mistake(f"no server at {url}: {error}; `python -m serve` starts one") from None
    if answer.status_code != 200:
        raise Mistake(f"{url}: {told(answer)}")
    return http, answer.json()["data"][0]["id"]


def main(argv: list[str] | None = None) -> int:
    """Talks until Ctrl-D. Returns the exit status: 0, or 1 if there is no server."""
    parser = argparse.ArgumentParser(prog="python -m serve.chat", description="Chat on the terminal with a running server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the API (default: %(default)s)")
    parser.add_argument("--api-key", metavar="KEY", help="if the server wants one")
    args = parser.parse_args(argv)
    colours = sys.stdout.isatty()
    try:
        http, model = connected(args.url, args.api_key)
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 1
    with contextlib.closing(http):
        print(f"{model}; /help for commands, Ctrl-D to leave")
        talk(Chat(http, model, colours), colours)
    return 0


def talk(chat: Chat, colours: bool) -> None:
    """Reads lines until there are no more."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (input() then edits lines and remembers them)
    going = True
    while going:
        try:
            going = chat.line(input("> "))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except Mistake as mistake:
            print(f"{RED}{mistake}{PLAIN}" if colours else mistake)
