"""Answers files of requests: `python -m serve.batch in.jsonl out.jsonl`, in the format of OpenAI's batch API.

Each answer is one line of the output, written atomically as soon as it is complete, in the order of
completion. A restart after a kill resumes: requests whose `custom_id` is in the output are skipped, and an
incomplete last line is cut off. Requests pass through the server's routes within this process; no server
needs to run.
"""

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import sys
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


def main(argv: list[str] | None = None) -> int:
    """Answers a file.

    Returns:
      The exit status: 0, 1 for a user's mistake (one line on stderr), 130 if interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        check_model_args(args)
        with open_locked(args.output) as out:
            completed = completed_ids(out)
            requests = [request for request in read_requests(args.input) if request["custom_id"] not in completed]
            if not requests:
                return 0
            service = build_service(args)
            try:
                asyncio.run(run_requests(service, requests, out, args.concurrency))
            finally:
                service.close()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def read_requests(path: Path) -> Iterator[dict[str, Any]]:
    """Yields a file's requests. Raises ValueError for the first line that is not a valid request."""
    first_line: dict[str, int] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            request = _parse_request(line, where)
            first = first_line.setdefault(request["custom_id"], number)
            if first != number:
                raise ValueError(f"{where}: custom_id {request['custom_id']!r} is line {first}'s already")
            yield request


def _parse_request(line: str, where: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(request, dict) or not isinstance(request.get("custom_id"), str):
        raise ValueError(f"{where}: expected an object with a custom_id")
    if request.get("method", "POST") != "POST":
        raise ValueError(f"{where}: method is {request['method']!r}, expected 'POST'")
    if request.get("url") not in ROUTES:
        raise ValueError(f"{where}: url is {request.get('url')!r}, expected one of {', '.join(ROUTES)}")
    body = request.get("body")
    if not isinstance(body, dict):
        raise ValueError(f"{where}: body is {type(body).__name__}, expected an object")
    if body.get("stream"):
        raise ValueError(f"{where}: body.stream is {body['stream']!r}, but a batch has no streams")
    return request


@contextlib.contextmanager
def open_locked(path: Path) -> Iterator[IO[str]]:
    """Opens the output and locks it for this process. Raises ValueError if another run has locked it."""
    with path.open("a+", encoding="utf-8") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path} is being written by another run") from None
        yield out


def completed_ids(out: IO[str]) -> set[str]:
    """Returns the `custom_id` of each answer in the output, and cuts off an incomplete last line."""
    completed, end = set(), 0
    out.seek(0)
    while line := out.readline():
        if not line.endswith("\n"):
            out.truncate(end)
            break
        completed.add(json.loads(line)["custom_id"])
        end = out.tell()
    out.seek(0, os.SEEK_END)
    return completed


async def run_requests(service: Any, requests: list[dict[str, Any]], out: IO[str], concurrency: int) -> None:
    """Sends the requests, `concurrency` at once, and writes each answer as it completes."""
    from serve.api import create_app  # imports jax: seconds, which --help and mistakes in the input do not need

    transport = httpx.ASGITransport(create_app(service))
    bar = tqdm(total=len(requests), unit="request", file=sys.stderr)
    async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as http:
        with bar:
            async for line in _output_lines(http, requests, concurrency):
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                out.flush()
                os.fsync(out.fileno())
                bar.update()


async def _output_lines(
    http: httpx.AsyncClient, requests: list[dict[str, Any]], concurrency: int
) -> AsyncIterator[dict[str, Any]]:
    waiting = iter(requests)
    running = {asyncio.create_task(_send(http, request)) for request in itertools.islice(waiting, concurrency)}
    try:
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            running |= {asyncio.create_task(_send(http, request)) for request in itertools.islice(waiting, len(done))}
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _send(http: httpx.AsyncClient, request: dict[str, Any]) -> dict[str, Any]:
    """Sends one request, again while the server is busy, and returns its line of the output."""
    while True:
        response = await http.post(request["url"], json=request["body"])
        if response.status_code not in RETRY_STATUSES:
            break
        await asyncio.sleep(RETRY_S)
    request_id = response.headers["X-Request-Id"]
    fields = {"status_code": response.status_code, "request_id": request_id, "body": response.json()}
    return {"id": f"batch_req_{request_id}", "custom_id": request["custom_id"], "response": fields, "error": None}


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
