"""Files of requests: `python -m serve.batch in.jsonl out.jsonl`, in the format of OpenAI's batch API.

An answer is one line of the output, written whole or not at all, as soon as it is there; the order is that of the answers.
Started anew after a kill, it goes on: requests whose `custom_id` stands in the output are not asked again, and half a
line that the kill left is cut off. Requests go through the same routes as a server's, in this process; a server need not run.
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

from serve.cli import args as flags

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
AGAIN = (429, 503)  # the server's word that asking later may help
RETRY_S = 0.2
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Answers a file. Returns the exit status: 0, 1 for a mistake (one line on stderr), 130 if interrupted."""
    from serve.__main__ import check_model, start

    args = _parser().parse_args(argv)
    try:
        check_model(args)
        with locked(args.output) as out:
            done = done_already(out)
            requests = [request for request in read_requests(args.input) if request["custom_id"] not in done]
            if not requests:
                return 0
            service = start(args)
            try:
                asyncio.run(answer_all(service, requests, out, args.concurrency))
            finally:
                service.close()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


def read_requests(path: Path) -> Iterator[dict[str, Any]]:
    """A file's requests. Raises ValueError for the first line that is none, before anything is asked."""
    seen: dict[str, int] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            request = _request(line, where)
            first = seen.setdefault(request["custom_id"], number)
            if first != number:
                raise ValueError(f"{where}: custom_id {request['custom_id']!r} is line {first}'s already")
            yield request


def _request(line: str, where: str) -> dict[str, Any]:
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
def locked(path: Path) -> Iterator[IO[str]]:
    """The output, for this process alone. Raises ValueError if another run writes to it."""
    with path.open("a+", encoding="utf-8") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path} is being written by another run") from None
        yield out


def done_already(out: IO[str]) -> set[str]:
    """Which requests have their answers in the output. Cuts off a last line that is not whole."""
    done, end = set(), 0
    out.seek(0)
    while line := out.readline():
        if not line.endswith("\n"):
            out.truncate(end)
            break
        done.add(json.loads(line)["custom_id"])
        end = out.tell()
    out.seek(0, os.SEEK_END)
    return done


async def answer_all(service: Any, requests: list[dict[str, Any]], out: IO[str], concurrency: int) -> None:
    """Asks them all, so many at once, and writes each answer as it comes."""
    from serve.api import create_app

    transport = httpx.ASGITransport(create_app(service))
    bar = tqdm(total=len(requests), unit="request", file=sys.stderr)
    async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as http:
        with bar:
            async for line in _answers(http, requests, concurrency):
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                out.flush()
                os.fsync(out.fileno())
                bar.update()


async def _answers(http: httpx.AsyncClient, requests: list[dict[str, Any]], concurrency: int) -> AsyncIterator[dict[str, Any]]:
    waiting = iter(requests)
    running = {asyncio.create_task(_answer(http, request)) for request in itertools.islice(waiting, concurrency)}
    try:
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            running |= {asyncio.create_task(_answer(http, request)) for request in itertools.islice(waiting, len(done))}
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _answer(http: httpx.AsyncClient, request: dict[str, Any]) -> dict[str, Any]:
    """One request's line of the output."""
    while True:
        answer = await http.post(request["url"], json=request["body"])
        if answer.status_code not in AGAIN:
            break
        await asyncio.sleep(RETRY_S)
    name = answer.headers["X-Request-Id"]
    response = {"status_code": answer.status_code, "request_id": name, "body": answer.json()}
    return {"id": f"batch_req_{name}", "custom_id": request["custom_id"], "response": response, "error": None}


def _parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m serve.batch", allow_abbrev=False, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("input", type=Path, metavar="in.jsonl", help="requests, one a line, each with a custom_id")
    parser.add_argument("output", type=Path, metavar="out.jsonl", help="answers; what stands there already is kept")
    parser.add_argument(
        "--concurrency", metavar="N", type=flags.positive, default=32, help="requests at once (default: %(default)s)"
    )
    flags.add_model_flags(parser)
    flags.add_engine_flags(parser.add_argument_group("engine"))
    return parser
