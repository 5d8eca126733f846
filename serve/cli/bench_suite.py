"""The README's table of a server under load: `python -m serve.table --model FOLDER --gpu [--output FILE]`.

Starts the server on this machine with an empty compilation cache and again with the filled one, each time to its first
answer, and loads the second with the loads of `python -m serve.bench`, one after the other. Server and client share the machine.
`--share 0.1` sends a tenth of the requests, to see whether it all works.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from serve.cli import bench

# Name, requests, `serve.cli.bench`'s arguments, and what of its numbers is shown.
TEXT, PICTURE = ("--input-len", "128"), ("--image", "1280x720", "--input-len", "128")
BUSY = ("--input-len", "1..1000", "--output-len", "1..1000", "--concurrency", "100")
DRAWN, TOP_P = ("--temperature", "0.7"), ("--extra-body", '{"top_p": 0.8}')
RATES = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")
LOADS = (
    ("text, 128 in, 256 out, one at a time", 8, (*TEXT, "--output-len", "256"), ("median_tpot_ms", "mean_ttft_ms")),
    ("text, 1..1000 in, 1..1000 out, 100 at once", 500, BUSY, RATES),
    ("text, 1..1000 in, 1..1000 out, 100 at once, drawn at 0.7", 500, (*BUSY, *DRAWN), RATES),
    ("text, 1..1000 in, 1..1000 out, 100 at once, drawn at 0.7, top-p 0.8", 500, (*BUSY, *DRAWN, *TOP_P), RATES),
    ("1280x720, one at a time", 10, (*PICTURE, "--output-len", "8"), ("mean_ttft_ms",)),
    (
        "1280x720 and 128 in, 128 out, 100 at once",
        300,
        (*PICTURE, "--output-len", "128", "--concurrency", "100"),
        ("request_throughput", "mean_ttft_ms"),
    ),
    (
        "1280x720 and 128 in, 1..1024 out, 100 at once",
        200,
        (*PICTURE, "--output-len", "1..1024", "--concurrency", "100"),
        ("request_throughput", "output_throughput"),
    ),
    ("chat, 256 out, one at a time", 4, ("--chat", *TEXT, "--output-len", "256"), ("median_tpot_ms",)),
    (
        "chat in a form, 256 out, one at a time",
        4,
        ("--chat", *TEXT, "--output-len", "256", "--response-format", "FORM"),
        ("median_tpot_ms",),
    ),
    ("chat, 256 out, 16 at once", 64, ("--chat", *TEXT, "--output-len", "256", "--concurrency", "16"), ("median_tpot_ms",)),
    (
        "chat in a form, 256 out, 16 at once",
        64,
        ("--chat", *TEXT, "--output-len", "256", "--concurrency", "16", "--response-format", "FORM"),
        ("median_tpot_ms",),
    ),
)
# A list too long for any of the answers: each is cut off at its length, as the free ones are.
FORM = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
}
FIRST = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@contextlib.contextmanager
def server(arguments: list[str], cache: Path, log: Path, patience_s: float) -> Iterator[tuple[str, float]]:
    """A server's address, and the seconds from its start to its first answer. Raises RuntimeError if it ends or is late."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "serve", "--port", str(port), *arguments]
    begun = time.perf_counter()
    with log.open("w") as lines:
        process = subprocess.Popen(command, stderr=lines, stdout=lines, env={**os.environ, "XDG_CACHE_HOME": str(cache)})
    address = f"http://127.0.0.1:{port}"
    try:
        while not _ready(address):
            if process.poll() is not None or time.perf_counter() - begun > patience_s:
                raise RuntimeError(f"the server did not start within {patience_s:g} s; its last lines: {_last_lines(log)}")
            time.sleep(0.1)
        name = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
        httpx.post(f"{address}/v1/completions", json={"model": name, **FIRST}, timeout=60).raise_for_status()
        yield address, time.perf_counter() - begun
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def _ready(address: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{address}/ready").status_code == 200
    return False


def _last_lines(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:])


def _steps(log: Path) -> str:
    """What the start was made of, in brackets."""
    steps = [line for line in log.read_text(errors="replace").splitlines() if " ... " in line]
    return f" ({'; '.join(steps)})" if steps else ""


def load(address: str, requests: int, arguments: tuple[str, ...], form: Path, seed: int) -> dict[str, float]:
    """`serve.cli.bench`'s numbers, with the engine's own: steps, and the host's milliseconds in each.

    Loads of different seeds have no picture and no prompt in common that the server could have kept.
    """
    before = _counters(address)
    given = [str(form) if argument == "FORM" else argument for argument in arguments]
    asked = bench.parser().parse_args(["--url", address, "--requests", str(requests), "--seed", str(seed), *given])
    numbers, results = asyncio.run(bench.bench(asked))
    for error in sorted({result.error for result in results if result.error is not None})[:3]:
        print(f"error: {error}", file=sys.stderr)
    steps, host = (after - start for after, start in zip(_counters(address), before, strict=True))
    return {**numbers, "steps": steps, "host_ms_a_step": host / max(steps, 1) * 1e3}


def _counters(address: str) -> tuple[float, float]:
    """Steps so far, and the seconds that the host worked for them."""
    wanted, found = ("minicpmv46_steps_total", "minicpmv46_host_seconds_total"), {}
    for line in httpx.get(f"{address}/metrics").text.splitlines():
        name, _, value = line.partition(" ")
        if name in wanted:
            found[name] = float(value)
    return found[wanted[0]], found[wanted[1]]


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; status 1 if a server did not start or a request failed."""
    parser = argparse.ArgumentParser(prog="python -m serve.table", description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the requests (default: %(default)s)")
    parser.add_argument("--only", default="", help="loads whose names contain this")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds a start may take (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all numbers as JSON too")
    given, of_server = parser.parse_known_args(arguments)
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        form, cache, log = Path(folder, "form.json"), Path(folder, "cache"), Path(folder, "server.log")
        form.write_text(json.dumps(FORM))
        cache.mkdir()
        try:
            with server(of_server, cache, log, given.patience) as (_, seconds):
                table["start to first answer, cache empty"] = {"seconds": seconds}
                print(f"start to first answer, cache empty: {seconds:.1f} s{_steps(log)}", flush=True)
            with server(of_server, cache, log, given.patience) as (address, seconds):
                table["start to first answer, cache filled"] = {"seconds": seconds}
                print(f"start to first answer, cache filled: {seconds:.1f} s{_steps(log)}", flush=True)
                for seed, (name, requests, loaded, shown) in enumerate(LOADS):
                    if given.only in name:
                        table[name] = load(address, max(int(requests * given.share), 1), loaded, form, seed)
                        shown = (*shown, "host_ms_a_step", "failed_requests")
                        print(f"{name}: {', '.join(f'{what} {table[name][what]:.2f}' for what in shown)}", flush=True)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            if given.output is not None:
                given.output.write_text(json.dumps(table, indent=2) + "\n")
    return int(any(numbers.get("failed_requests") for numbers in table.values()))
