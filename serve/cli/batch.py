"""Answers files of requests: `python -m serve.batch in.jsonl out.jsonl`, in the format of OpenAI's batch API.

Each answer is one line of the output, written atomically as soon as it is complete, in the order of
completion. A line that is no valid request gets an `error` object in place of a response, and the others are
answered. Requests pass through the server's routes within this process; no server needs to run.

A restart after a kill resumes: answered requests are skipped, errors are not written twice, and an incomplete
last line is cut off. Lines that were corrected since, and requests that failed in the server, are sent again;
the last line of a `custom_id` is the valid one.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import reprlib
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
from tqdm import tqdm

from serve.cli.args import FlexibleArgumentParser, add_engine_flags, add_model_flags, positive_int
from serve.cli.build_service import build_service, check_model_args

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
RETRY_STATUSES = (429, 503)  # the server's queue is full or it is busy
RETRY_S = 0.2
EXIT_INTERRUPTED = 130
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: it has no UTF-8 encoding


class EngineGone(Exception):
    """The engine has stopped, so no further request can be answered."""


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """One valid line of the input.

    Attributes:
      custom_id: the client's name of the request.
      url: the route.
      content: the request's body as JSON.
    """

    custom_id: str
    url: str
    content: bytes


@dataclasses.dataclass(frozen=True)
class Failure:
    """An input line without an answer, as OpenAI's error object.

    Attributes:
      custom_id: the line's custom_id; None if it has none or repeats an earlier line's.
      code: "invalid_json_line", "duplicate_custom_id", "invalid_request" or "server_error".
      message: the mistake; begins with the line's number where the line is at fault.
    """

    custom_id: str | None
    code: str
    message: str

    def output(self) -> dict[str, Any]:
        """Returns the failure's line of the output."""
        error = {"code": self.code, "message": self.message}
        return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": self.custom_id, "response": None, "error": error}


def main(argv: list[str] | None = None) -> int:
    """Answers a file.

    Returns:
      The exit status: 0, 1 for a mistake of the user, lines without an answer or an engine that stopped (one
      line on stderr), 130 if interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        check_model_args(args)
        with open_locked(args.output) as out:
            failures = answer_file(args, out)
    except (ValueError, OSError, EngineGone) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    if failures:
        count = f"{len(failures)} lines have no answer" if len(failures) > 1 else "1 line has no answer"
        print(f"error: {count}; {args.output} has the reasons. The first: {failures[0]}", file=sys.stderr)
    return 1 if failures else 0


def answer_file(args: Any, out: IO[bytes]) -> list[str]:
    """Answers the requests that the output lacks, and returns the messages of all lines without an answer."""
    answered, reported = read_output(out)
    lines = list(read_requests(args.input))
    mistakes = [line for line in lines if isinstance(line, Failure)]
    for mistake in mistakes:
        if (mistake.custom_id, mistake.message) not in reported:
            write_line(out, mistake.output())
    requests = [line for line in lines if isinstance(line, BatchRequest) and line.custom_id not in answered]
    failed = []
    if requests:
        service = build_service(args)
        try:
            failed = asyncio.run(run_requests(service, requests, out, args.concurrency))
        finally:
            service.close()
    return [*(mistake.message for mistake in mistakes), *failed]


def read_requests(path: Path) -> Iterator[BatchRequest | Failure]:
    """Yields a file's requests, and a failure for each line that is not a valid request."""
    first_line: dict[str, int] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            request = _parse_line(line, f"line {number}")
            if isinstance(request, BatchRequest) and (first := first_line.setdefault(request.custom_id, number)) != number:
                message = f"line {number}: custom_id {reprlib.repr(request.custom_id)} is line {first}'s already"
                request = Failure(None, "duplicate_custom_id", message)
            yield request


def _parse_line(line: bytes, where: str) -> BatchRequest | Failure:
    custom_id = None
    try:
        raw = json.loads(line.decode("utf-8-sig"))
        custom_id = _custom_id(raw)
        if (mistake := _mistake(raw)) is not None:
            return Failure(custom_id, "invalid_request", f"{where}: {mistake}")
        content = json.dumps(raw["body"], ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        return Failure(custom_id, "invalid_json_line", f"{where}: {_json_mistake(error)}")
    return BatchRequest(raw["custom_id"], raw["url"], content)


def _custom_id(raw: Any) -> str | None:
    """Returns a line's custom_id, or None if it has none that can be written."""
    custom_id = raw.get("custom_id") if isinstance(raw, dict) else None
    return custom_id if isinstance(custom_id, str) and not SURROGATE.search(custom_id) else None


def _mistake(raw: Any) -> str | None:
    """Returns the first mistake in a line's fields, or None."""
    if not isinstance(raw, dict) or "custom_id" not in raw:
        return "expected an object with a custom_id"
    if _custom_id(raw) is None:
        return f"custom_id is {reprlib.repr(raw['custom_id'])}, expected a string of whole characters"
    method, url, body = raw.get("method", "POST"), raw.get("url"), raw.get("body")
    if method != "POST":
        return f"method is {reprlib.repr(method)}, expected 'POST'"
    if url not in ROUTES:
        return f"url is {reprlib.repr(url)}, expected one of {', '.join(ROUTES)}"
    if not isinstance(body, dict):
        return f"body is {reprlib.repr(body)}, expected an object"
    if body.get("stream"):
        return f"body.stream is {reprlib.repr(body['stream'])}, but a batch has no streams"
    return None


def _json_mistake(error: ValueError | RecursionError) -> str:
    match error:
        case UnicodeDecodeError():
            return f"not valid UTF-8: {error.reason} at byte {error.start}"
        case UnicodeEncodeError():
            return "body has half a character in it: a \\ud800 to \\udfff escape without its partner"
        case RecursionError():
            return "nested too deeply"
    return f"not valid JSON: {error}"


@contextlib.contextmanager
def open_locked(path: Path) -> Iterator[IO[bytes]]:
    """Opens the output and locks it for this process. Raises ValueError if another run has locked it."""
    with path.open("a+b") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path} is being written by another run") from None
        yield out


def read_output(out: IO[bytes]) -> tuple[set[str], set[tuple[str | None, str]]]:
    """Reads the output of earlier runs, and cuts off an incomplete last line.

    Returns:
      The `custom_id` of each answered request, and (custom_id, message) of each error that was written.

    Raises:
      ValueError: a line is not one that this command writes.
    """
    answered: set[str] = set()
    reported: set[tuple[str | None, str]] = set()
    end = 0
    out.seek(0)
    for number, line in enumerate(iter(out.readline, b""), 1):
        if not line.endswith(b"\n"):
            out.truncate(end)
            break
        end += len(line)
        try:
            record = json.loads(line)
            custom_id, error, response = record["custom_id"], record.get("error"), record.get("response")
            if error is not None:
                reported.add((custom_id, error["message"]))
            elif response is None or response["status_code"] < 500:
                answered.add(custom_id)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(f"{out.name}, line {number}: not an answer of a batch; name another output") from None
    out.seek(0, os.SEEK_END)
    return answered, reported


def write_line(out: IO[bytes], line: dict[str, Any]) -> None:
    """Appends one line of the output and waits until it is on the disk."""
    out.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    out.flush()
    os.fsync(out.fileno())


async def run_requests(service: Any, requests: list[BatchRequest], out: IO[bytes], concurrency: int) -> list[str]:
    """Sends the requests, `concurrency` at once, and writes each answer as it completes.

    Returns:
      The messages of the requests that failed in the server.

    Raises:
      EngineGone: the engine has stopped; the answers so far are written.
    """
    from serve.api import create_app  # imports jax: seconds, which --help and mistakes in the input do not need

    failed = []
    transport = httpx.ASGITransport(create_app(service))
    bar = tqdm(total=len(requests), unit="request", file=sys.stderr)
    async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as http:
        with bar:
            async for line in _output_lines(service, http, requests, concurrency):
                write_line(out, line)
                failed += _server_failure(line)
                bar.update()
    return failed


def _server_failure(line: dict[str, Any]) -> list[str]:
    """Returns the message of an output line that reports a failure of the server, else an empty list."""
    if line["error"] is not None:
        return [line["error"]["message"]]
    status = line["response"]["status_code"]
    return [f"{reprlib.repr(line['custom_id'])} failed in the server with status {status}"] if status >= 500 else []


async def _output_lines(
    service: Any, http: httpx.AsyncClient, requests: list[BatchRequest], concurrency: int
) -> AsyncIterator[dict[str, Any]]:
    waiting = iter(requests)

    def start(number: int) -> set[asyncio.Task[dict[str, Any]]]:
        return {asyncio.create_task(_send(service, http, request)) for request in itertools.islice(waiting, number)}

    running = start(concurrency)
    try:
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is None:
                    yield task.result()
            for task in done:
                task.result()  # raises EngineGone only after the answers are written
            running |= start(len(done))
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _send(service: Any, http: httpx.AsyncClient, request: BatchRequest) -> dict[str, Any]:
    """Sends one request, again while the server is busy, and returns its line of the output."""
    headers = {"Content-Type": "application/json"}
    while True:
        try:
            response = await http.post(request.url, content=request.content, headers=headers)
        except Exception as error:  # the application's own: it must not end the answers of other requests
            message = f"{reprlib.repr(request.custom_id)} failed in the server: {type(error).__name__}"
            return Failure(request.custom_id, "server_error", message).output()
        if response.status_code not in RETRY_STATUSES:
            break
        if not service.engine.alive:
            raise EngineGone(f"the engine has stopped ({response.text[:200]}); the same command resumes from here")
        await asyncio.sleep(RETRY_S)
    request_id = response.headers["X-Request-Id"]
    fields = {"status_code": response.status_code, "request_id": request_id, "body": response.json()}
    return {"id": f"batch_req_{request_id}", "custom_id": request.custom_id, "response": fields, "error": None}


def _parser() -> FlexibleArgumentParser:
    description = (__doc__ or "").partition("\n")[0]
    parser = FlexibleArgumentParser(prog="python -m serve.batch", allow_abbrev=False, description=description)
    parser.add_argument("input", type=Path, metavar="in.jsonl", help="requests, one a line, each with a custom_id")
    parser.add_argument("output", type=Path, metavar="out.jsonl", help="answers; existing lines are kept")
    parser.add_argument(
        "--concurrency", metavar="N", type=positive_int, default=32, help="requests at once (default: %(default)s)"
    )
    add_model_flags(parser)
    add_engine_flags(parser.add_argument_group("engine"))
    return parser
