"""Runs the benchmarks of a server under load: `python -m serve.table --model FOLDER --gpu [--output FILE]`.

It starts the server on this machine with an empty compilation cache and again with the filled one, and times
each start up to the first answer. It then runs the workloads of `python -m serve.bench` on the second server,
one after the other. Server and client share the machine. `--share 0.1` sends a tenth of the requests, as a
quick check that all workloads run.
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

# Name, number of requests, arguments of `serve.cli.bench`, and the numbers that are printed.
TEXT, IMAGE = ("--input-len", "128"), ("--image", "1280x720", "--input-len", "128")
BUSY = ("--input-len", "1..1000", "--output-len", "1..1000", "--concurrency", "100")
SAMPLED, TOP_P = ("--temperature", "0.7"), ("--extra-body", '{"top_p": 0.8}')
SCHEMA_FILE = "SCHEMA"  # stands for the path of a file with SCHEMA
RATES = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")
WORKLOADS = (
    ("text, 128 in, 256 out, one at a time", 8, (*TEXT, "--output-len", "256"), ("median_tpot_ms", "mean_ttft_ms")),
    ("text, 1..1000 in, 1..1000 out, 100 at once", 500, BUSY, RATES),
    ("text, 1..1000 in, 1..1000 out, 100 at once, temperature 0.7", 500, (*BUSY, *SAMPLED), RATES),
    ("text, 1..1000 in, 1..1000 out, 100 at once, temperature 0.7, top-p 0.8", 500, (*BUSY, *SAMPLED, *TOP_P), RATES),
    ("1280x720, one at a time", 10, (*IMAGE, "--output-len", "8"), ("mean_ttft_ms",)),
    (
        "1280x720 and 128 in, 128 out, 100 at once",
        300,
        (*IMAGE, "--output-len", "128", "--concurrency", "100"),
        ("request_throughput", "mean_ttft_ms"),
    ),
    (
        "1280x720 and 128 in, 1..1024 out, 100 at once",
        200,
        (*IMAGE, "--output-len", "1..1024", "--concurrency", "100"),
        ("request_throughput", "output_throughput"),
    ),
    ("chat, 256 out, one at a time", 4, ("--chat", *TEXT, "--output-len", "256"), ("median_tpot_ms",)),
    (
        "chat with structured output, 256 out, one at a time",
        4,
        ("--chat", *TEXT, "--output-len", "256", "--response-format", SCHEMA_FILE),
        ("median_tpot_ms",),
    ),
    ("chat, 256 out, 16 at once", 64, ("--chat", *TEXT, "--output-len", "256", "--concurrency", "16"), ("median_tpot_ms",)),
    (
        "chat with structured output, 256 out, 16 at once",
        64,
        ("--chat", *TEXT, "--output-len", "256", "--concurrency", "16", "--response-format", SCHEMA_FILE),
        ("median_tpot_ms",),
    ),
)
# A list longer than any answer: each answer ends at its length, as those without structured output do.
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
}
FIRST_REQUEST = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@contextlib.contextmanager
def start_server(arguments: list[str], cache: Path, log: Path, timeout_s: float) -> Iterator[tuple[str, float]]:
    """Starts a server, and yields its address and the seconds from its start to its first answer.

    Raises RuntimeError if the server ends, or takes longer than `timeout_s`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "serve", "--port", str(port), *arguments]
    start = time.perf_counter()
    with log.open("w") as lines:
        process = subprocess.Popen(command, stderr=lines, stdout=lines, env={**os.environ, "XDG_CACHE_HOME": str(cache)})
    address = f"http://127.0.0.1:{port}"
    try:
        while not _is_ready(address):
            if process.poll() is not None or time.perf_counter() - start > timeout_s:
                raise RuntimeError(f"the server did not start within {timeout_s:g} s; its last lines: {_last_lines(log)}")
            time.sleep(0.1)
        name = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
        httpx.post(f"{address}/v1/completions", json={"model": name, **FIRST_REQUEST}, timeout=60).raise_for_status()
        yield address, time.perf_counter() - start
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def _is_ready(address: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{address}/ready").status_code == 200
    return False


def _last_lines(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:])


def _startup_times(log: Path) -> str:
    """Returns the timed parts of the start in brackets, or an empty string."""
    parts = [line for line in log.read_text(errors="replace").splitlines() if " ... " in line]
    return f" ({'; '.join(parts)})" if parts else ""


def run_workload(address: str, requests: int, arguments: tuple[str, ...], schema: Path, seed: int) -> dict[str, float]:
    """Returns the numbers of `serve.cli.bench`, the engine's steps and the host's milliseconds per step.

    Workloads of different seeds share no image and no prompt, so the server's caches cannot make a later one
    look fast.
    """
    before = _engine_counters(address)
    arguments = tuple(str(schema) if argument == SCHEMA_FILE else argument for argument in arguments)
    fixed = ("--url", address, "--requests", str(requests), "--seed", str(seed))
    numbers, results = asyncio.run(bench.run_benchmark(bench.make_parser().parse_args([*fixed, *arguments])))
    for error in sorted({result.error for result in results if result.error is not None})[:3]:
        print(f"error: {error}", file=sys.stderr)
    steps, host_seconds = (after - start for after, start in zip(_engine_counters(address), before, strict=True))
    return {**numbers, "steps": steps, "host_ms_a_step": host_seconds / max(steps, 1) * 1e3}


def _engine_counters(address: str) -> tuple[float, float]:
    """Returns the engine's steps so far, and the seconds of host time that they took."""
    names, values = ("minicpmv46_steps_total", "minicpmv46_host_seconds_total"), {}
    for line in httpx.get(f"{address}/metrics").text.splitlines():
        name, _, value = line.partition(" ")
        if name in names:
            values[name] = float(value)
    return values[names[0]], values[names[1]]


def main(arguments: list[str] | None = None) -> int:
    """Prints the table. Returns status 1 if a server did not start or a request failed."""
    parser = argparse.ArgumentParser(prog="python -m serve.table", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the requests to send (default: %(default)s)")
    parser.add_argument("--only", default="", help="run only workloads whose names contain this")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds that a start may take (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all numbers as JSON too")
    args, server_args = parser.parse_known_args(arguments)
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        schema, cache, log = Path(folder, "schema.json"), Path(folder, "cache"), Path(folder, "server.log")
        schema.write_text(json.dumps(SCHEMA))
        cache.mkdir()
        try:
            with start_server(server_args, cache, log, args.patience) as (_, seconds):
                table["start to first answer, cache empty"] = {"seconds": seconds}
                print(f"start to first answer, cache empty: {seconds:.1f} s{_startup_times(log)}", flush=True)
            with start_server(server_args, cache, log, args.patience) as (address, seconds):
                table["start to first answer, cache filled"] = {"seconds": seconds}
                print(f"start to first answer, cache filled: {seconds:.1f} s{_startup_times(log)}", flush=True)
                for seed, (name, requests, bench_args, printed) in enumerate(WORKLOADS):
                    if args.only in name:
                        table[name] = run_workload(address, max(int(requests * args.share), 1), bench_args, schema, seed)
                        printed = (*printed, "host_ms_a_step", "failed_requests")
                        print(f"{name}: {', '.join(f'{key} {table[name][key]:.2f}' for key in printed)}", flush=True)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            if args.output is not None:
                args.output.write_text(json.dumps(table, indent=2) + "\n")
    return int(any(numbers.get("failed_requests") for numbers in table.values()))
