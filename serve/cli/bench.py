"""Loads an OpenAI-compatible server and times it.

Usage: `python -m serve.bench --url http://127.0.0.1:8000 --requests 500 --concurrency 100`.

All requests are drawn before the first one is sent. There are four kinds of workload:
- by default, prompts of random token ids to /v1/completions, with input and output lengths drawn uniformly
  from ranges;
- with `--chat`, random words to /v1/chat/completions;
- with `--image 1280x720`, random JPEG images before the words;
- with `--turns 3`, conversations that send all earlier turns again.

Answers ignore the end token (`ignore_eos`) up to their drawn length. With `--response-format FILE` chats ask
for structured output instead, and end with it.

The terms are those of SGLang's bench_serving. TTFT is the time to the first token, TPOT the mean time of each
later token of a request, and E2E the time of a whole request. ITL is the time between two chunks of a stream,
divided by the mean number of tokens in a chunk.
"""

import argparse
import asyncio
import base64
import dataclasses
import io
import json
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

from serve.cli.sse_client import SSELineReader

WORDS = "time people water light house world story night river music".split()


@dataclasses.dataclass
class RequestResult:
    """Timings of one request and the server's token counts.

    Attributes:
      chunk_times: seconds from the request's start to each chunk with text.
      seconds: seconds from the request's start to its end.
      input_tokens, output_tokens: the server's usage numbers.
      text: the answer.
      error: a message if the request failed.
    """

    chunk_times: list[float]
    seconds: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str | None = None


async def send_request(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> RequestResult:
    """Sends a request, reads its stream and returns its timings."""
    result, start = RequestResult([]), time.perf_counter()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    if "response_format" not in body:
        body["ignore_eos"] = True
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                result.error = f"{response.status_code}: {(await response.aread()).decode()[:200]}"
            reader = SSELineReader()
            async for chunk in response.aiter_bytes():
                for line in reader.feed(chunk):
                    if line.startswith("data: {"):
                        _record_event(json.loads(line[6:]), result, time.perf_counter() - start)
    except httpx.HTTPError as error:
        result.error = repr(error)
    result.seconds = time.perf_counter() - start
    return result


def _record_event(event: dict[str, Any], result: RequestResult, now: float) -> None:
    if "error" in event:
        result.error = event["error"]["message"]
    if usage := event.get("usage"):
        result.input_tokens, result.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in event.get("choices", ()):
        delta = choice.get("delta")
        if delta is None or "content" in delta:
            result.text += (choice.get("text") if delta is None else delta["content"]) or ""
        if delta is None or delta.get("content") or choice.get("finish_reason"):
            result.chunk_times.append(now)


class Turn(NamedTuple):
    """One request's token ids or message parts, and the number of tokens of its answer."""

    content: list[Any]
    output_len: int


class Workload:
    """All requests of a run, drawn before the clock starts. A conversation counts as one request."""

    def __init__(self, args: argparse.Namespace, client: httpx.AsyncClient):
        self.args, self.client = args, client
        self.chat = args.chat or args.turns > 1 or args.image is not None or args.response_format is not None
        with ThreadPoolExecutor() as pool:  # an image takes 15 ms, and resizing it releases the GIL
            self.conversations = list(pool.map(self._draw, range(args.requests + args.warmup)))

    def _draw(self, i: int) -> list[Turn]:
        args, rng, turns = self.args, np.random.default_rng([self.args.seed, i]), []
        for turn in range(args.turns):
            input_len = self._draw_length(rng, args.input_len)
            if not self.chat:
                content = rng.integers(0, args.ids, input_len).tolist()
            else:
                content = [{"type": "text", "text": " ".join(rng.choice(WORDS, input_len).tolist())}]
                if turn == 0 and args.image is not None:
                    content = [*(_random_image(rng, args.image) for _ in range(args.images)), *content]
            turns.append(Turn(content, self._draw_length(rng, args.output_len)))
        return turns

    async def send(self, i: int) -> list[RequestResult]:
        """Sends the i-th request, or the turns of the i-th conversation one after the other."""
        if not self.chat:
            return [await self._send("/v1/completions", turn.output_len, prompt=turn.content) for turn in self.conversations[i]]
        results, messages = [], []
        fields = {} if self.args.response_format is None else {"response_format": self.args.response_format}
        for turn in self.conversations[i]:
            messages.append({"role": "user", "content": turn.content})
            results.append(await self._send("/v1/chat/completions", turn.output_len, messages=messages, **fields))
            messages.append({"role": "assistant", "content": results[-1].text or "-"})
        return results

    def _send(self, path: str, output_len: int, **body: Any) -> Awaitable[RequestResult]:
        fields = {"model": self.args.model, "max_tokens": output_len, "temperature": self.args.temperature}
        return send_request(self.client, path, fields | body | self.args.extra_body)

    def _draw_length(self, rng: np.random.Generator, bounds: tuple[int, int]) -> int:
        return int(rng.integers(bounds[0], bounds[1] + 1))


def _random_image(rng: np.random.Generator, size: tuple[int, int]) -> dict[str, Any]:
    """Returns an image part with a JPEG of coarse noise, its file about as large as a photograph's."""
    specks = rng.integers(0, 256, (size[1] // 16 + 1, size[0] // 16 + 1, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(specks).resize(size).save(file, "JPEG", quality=85)
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"}}


async def run_workload(
    args: argparse.Namespace, send: Callable[[int], Awaitable[list[RequestResult]]]
) -> tuple[list[RequestResult], float]:
    """Sends all requests, `concurrency` at a time or `rate` a second at random times.

    Returns:
      The results, and the seconds that all of it took.
    """
    gate = asyncio.Semaphore(args.concurrency if args.rate is None else args.requests)
    bar = tqdm(total=args.requests, unit="request", disable=None, leave=False)

    async def send_gated(i: int) -> list[RequestResult]:
        async with gate:
            results = await send(i)
        bar.update()
        return results

    rng, tasks, start = np.random.default_rng(args.seed), [], time.perf_counter()
    for i in range(args.requests):
        tasks.append(asyncio.create_task(send_gated(i)))
        if args.rate is not None:
            await asyncio.sleep(rng.exponential(1 / args.rate))
    results = [result for turns in await asyncio.gather(*tasks) for result in turns]
    bar.close()
    return results, time.perf_counter() - start


def summarize(results: list[RequestResult], seconds: float) -> dict[str, float]:
    """Returns the numbers of SGLang's bench_serving, with latencies in milliseconds."""
    good = [result for result in results if result.error is None and result.chunk_times]
    tokens = sum(result.output_tokens for result in good)
    inputs = sum(result.input_tokens for result in good)
    out = {
        "successful_requests": len(good),
        "failed_requests": len(results) - len(good),
        "duration_s": seconds,
        "total_input_tokens": inputs,
        "total_output_tokens": tokens,
        "request_throughput": len(good) / seconds,
        "input_throughput": inputs / seconds,
        "output_throughput": tokens / seconds,
    }
    multi_token = [result for result in good if result.output_tokens > 1]
    gaps = np.concatenate([np.diff(result.chunk_times) for result in good]) if good else np.zeros(0)
    chunks = max(sum(len(result.chunk_times) for result in good), 1)
    series = {
        "e2e": [result.seconds for result in good],
        "ttft": [result.chunk_times[0] for result in good],
        "tpot": [(result.chunk_times[-1] - result.chunk_times[0]) / (result.output_tokens - 1) for result in multi_token],
        "itl": gaps * chunks / max(tokens, 1),
    }
    for name, values in series.items():
        for statistic, reduce in (("mean", np.mean), ("median", np.median), ("p99", lambda x: np.percentile(x, 99))):
            out[f"{statistic}_{name}_ms"] = float(reduce(values)) * 1e3 if len(values) else 0.0
    return out


async def run_benchmark(args: argparse.Namespace) -> tuple[dict[str, float], list[RequestResult]]:
    """Runs the workload of the arguments against a server, and returns the summary and all results."""
    headers = {} if args.api_key is None else {"Authorization": f"Bearer {args.api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=args.url, headers=headers, timeout=args.timeout, limits=limits) as client:
        if args.model is None:
            args.model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        workload = Workload(args, client)
        for i in range(args.warmup):
            await workload.send(args.requests + i)
        results, seconds = await run_workload(args, workload.send)
    return summarize(results, seconds), results


def main(arguments: list[str] | None = None) -> int:
    """Prints the numbers, and writes them as JSON if asked to. Returns status 1 if a request failed."""
    args = make_parser().parse_args(arguments)
    try:
        numbers, results = asyncio.run(run_benchmark(args))
    except httpx.HTTPError as error:
        print(f"error: {args.url}: {error!r}", file=sys.stderr)
        return 1
    for name, value in numbers.items():
        print(f"{name:24s} {value:12.2f}" if isinstance(value, float) else f"{name:24s} {value:9d}")
    errors = {result.error for result in results if result.error is not None}
    for error in sorted(errors)[:5]:
        print(f"error: {error}", file=sys.stderr)
    if args.output is not None:
        settings = {name: value for name, value in vars(args).items() if name not in ("api_key", "output")}
        args.output.write_text(json.dumps({"settings": settings, **numbers}, indent=2) + "\n")
    return 1 if errors else 0


def _length_range(text: str) -> tuple[int, int]:
    """Parses "7" or "1..1000"."""
    low, _, high = text.partition("..")
    bounds = int(low), int(high or low)
    if not 1 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of lengths, as in 128 or 1..1000")
    return bounds


def _image_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not an image size, as in 1280x720")
    return int(width), int(height)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, as in '{{\"top_p\": 0.8}}'")
    return value


def _response_format(path: str) -> dict[str, Any]:
    """Reads OpenAI's response_format from a file, or a JSON schema, which it wraps in one."""
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{path} holds {value!r}, expected a response_format or a JSON schema")
    if value.get("type") in ("text", "json_object", "json_schema"):
        return value
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value}}


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m serve.bench", description="Load an OpenAI-compatible server and time it.")
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    add("--model", help="default: the server's first model")
    add("--api-key", help="sent as `Authorization: Bearer KEY`")
    add("--requests", type=int, default=100, help="requests, or conversations with --turns (default: %(default)s)")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", type=int, default=1, help="requests in flight (default: %(default)s)")
    pace.add_argument("--rate", type=float, help="requests a second, at random times, instead of a fixed concurrency")
    add("--input-len", metavar="N[..M]", type=_length_range, default=(128, 128), help="tokens of a prompt; in chats words")
    add("--output-len", metavar="N[..M]", type=_length_range, default=(128, 128), help="tokens of an answer")
    add("--ids", type=int, default=30_000, help="token ids are drawn below this (default: %(default)s)")
    add("--chat", action="store_true", help="words to chat completions, instead of token ids to completions")
    add("--response-format", metavar="FILE", type=_response_format, help="a response_format, or a JSON schema, for chats")
    add("--image", metavar="WxH", type=_image_size, help="begin each prompt with random images of this size")
    add("--images", type=int, default=1, help="images per prompt (default: %(default)s)")
    add("--turns", type=int, default=1, help="turns of a conversation (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="default: %(default)s")
    add(
        "--extra-body",
        "--extra-request-body",
        metavar="JSON",
        type=_json_object,
        default={},
        help="further fields of each request, such as '{\"top_p\": 0.8}'",
    )
    add("--seed", type=int, default=0, help="of all draws; a server may have cached an earlier run's (default: %(default)s)")
    add("--warmup", type=int, default=1, help="requests before the clock starts (default: %(default)s)")
    add("--timeout", type=float, default=600.0, help="seconds without data after which a request fails (default: %(default)s)")
    add("--output", metavar="FILE", type=Path, help="write the numbers as JSON too")
    return parser
