"""Load on an OpenAI-compatible server: `python -m serve.bench --url http://127.0.0.1:8000 --requests 500 --concurrency 100`.

Four kinds of load, all drawn before the first request is sent. By default prompts of random token ids to /v1/completions, input
and output lengths drawn evenly from ranges. With `--chat` random words to /v1/chat/completions; with `--image 1280x720` a random
JPEG before them. With `--turns 3` conversations, whose each turn sends the ones before again. Every answer goes on past its end
token (`ignore_eos`) to its drawn length, but with `--response-format FILE`, which asks for answers of a form in chats: they end
where their form does.

The terms are those of SGLang's bench_serving: TTFT is the time to the first token, TPOT the mean time of each later token of a
request, ITL the time between two chunks of a stream divided by the tokens a chunk has on average, E2E a whole request's time.
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

from serve.cli.sse_client import Lines

WORDS = "time people water light house world story night river music".split()


@dataclasses.dataclass
class Result:
    """One request: seconds from its start to each chunk that brought text, and what the server counted."""

    chunks: list[float]
    seconds: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str | None = None


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Result:
    """Sends a request and reads its stream."""
    result, start = Result([]), time.perf_counter()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    if "response_format" not in body:
        body["ignore_eos"] = True
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                result.error = f"{response.status_code}: {(await response.aread()).decode()[:200]}"
            lines = Lines()
            async for piece in response.aiter_bytes():
                for line in lines.take(piece):
                    if line.startswith("data: {"):
                        _read(json.loads(line[6:]), result, time.perf_counter() - start)
    except httpx.HTTPError as error:
        result.error = repr(error)
    result.seconds = time.perf_counter() - start
    return result


def _read(event: dict[str, Any], result: Result, now: float) -> None:
    if "error" in event:
        result.error = event["error"]["message"]
    if usage := event.get("usage"):
        result.input_tokens, result.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in event.get("choices", ()):
        delta = choice.get("delta")
        if delta is None or "content" in delta:
            result.text += (choice.get("text") if delta is None else delta["content"]) or ""
        if delta is None or delta.get("content") or choice.get("finish_reason"):
            result.chunks.append(now)


class Turn(NamedTuple):
    """What a request says, token ids or the parts of a message, and how many tokens its answer is to have."""

    said: list[Any]
    output_len: int


class Load:
    """What is sent, drawn before the clock starts: `request(i)` sends the i-th request, or the i-th conversation's turns."""

    def __init__(self, args: argparse.Namespace, client: httpx.AsyncClient):
        self.args, self.client = args, client
        self.chat = args.chat or args.turns > 1 or args.image is not None or args.response_format is not None
        with ThreadPoolExecutor() as pool:  # a picture takes 15 ms, and resizing it lets go of the GIL
            self.drawn = list(pool.map(self._draw, range(args.requests + args.warmup)))

    def _draw(self, i: int) -> list[Turn]:
        args, rng, turns = self.args, np.random.default_rng([self.args.seed, i]), []
        for turn in range(args.turns):
            size = self._length(rng, args.input_len)
            if not self.chat:
                said = rng.integers(0, args.ids, size).tolist()
            else:
                said = [{"type": "text", "text": " ".join(rng.choice(WORDS, size).tolist())}]
                if turn == 0 and args.image is not None:
                    said = [*(_picture(rng, args.image) for _ in range(args.images)), *said]
            turns.append(Turn(said, self._length(rng, args.output_len)))
        return turns

    async def request(self, i: int) -> list[Result]:
        if not self.chat:
            return [await self._send("/v1/completions", turn.output_len, prompt=turn.said) for turn in self.drawn[i]]
        results, messages = [], []
        form = {} if self.args.response_format is None else {"response_format": self.args.response_format}
        for turn in self.drawn[i]:
            messages.append({"role": "user", "content": turn.said})
            results.append(await self._send("/v1/chat/completions", turn.output_len, messages=messages, **form))
            messages.append({"role": "assistant", "content": results[-1].text or "-"})
        return results

    def _send(self, path: str, output_len: int, **body: Any) -> Awaitable[Result]:
        fields = {"model": self.args.model, "max_tokens": output_len, "temperature": self.args.temperature}
        return ask(self.client, path, fields | body | self.args.extra_body)

    def _length(self, rng: np.random.Generator, bounds: tuple[int, int]) -> int:
        return int(rng.integers(bounds[0], bounds[1] + 1))


def _picture(rng: np.random.Generator, size: tuple[int, int]) -> dict[str, Any]:
    """A random JPEG: noise of 16 x 16 pixels a speck, about as large a file as a photograph."""
    specks = rng.integers(0, 256, (size[1] // 16 + 1, size[0] // 16 + 1, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(specks).resize(size).save(file, "JPEG", quality=85)
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"}}


async def run(args: argparse.Namespace, request: Callable[[int], Awaitable[list[Result]]]) -> tuple[list[Result], float]:
    """Sends all requests: `concurrency` at a time, or `rate` a second at random times. Results, and the seconds it took."""
    gate = asyncio.Semaphore(args.concurrency if args.rate is None else args.requests)
    bar = tqdm(total=args.requests, unit="request", disable=None, leave=False)

    async def one(i: int) -> list[Result]:
        async with gate:
            results = await request(i)
        bar.update()
        return results

    rng, tasks, start = np.random.default_rng(args.seed), [], time.perf_counter()
    for i in range(args.requests):
        tasks.append(asyncio.create_task(one(i)))
        if args.rate is not None:
            await asyncio.sleep(rng.exponential(1 / args.rate))
    results = [result for many in await asyncio.gather(*tasks) for result in many]
    bar.close()
    return results, time.perf_counter() - start


def summary(results: list[Result], seconds: float) -> dict[str, float]:
    """SGLang's numbers; times in milliseconds."""
    good = [result for result in results if result.error is None and result.chunks]
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
    several = [result for result in good if result.output_tokens > 1]
    gaps = np.concatenate([np.diff(result.chunks) for result in good]) if good else np.zeros(0)
    chunks = max(sum(len(result.chunks) for result in good), 1)
    series = {
        "e2e": [result.seconds for result in good],
        "ttft": [result.chunks[0] for result in good],
        "tpot": [(result.chunks[-1] - result.chunks[0]) / (result.output_tokens - 1) for result in several],
        "itl": gaps * chunks / max(tokens, 1),
    }
    for name, values in series.items():
        for kind, of in (("mean", np.mean), ("median", np.median), ("p99", lambda x: np.percentile(x, 99))):
            out[f"{kind}_{name}_ms"] = float(of(values)) * 1e3 if len(values) else 0.0
    return out


async def bench(args: argparse.Namespace) -> tuple[dict[str, float], list[Result]]:
    """One run against a server."""
    headers = {} if args.api_key is None else {"Authorization": f"Bearer {args.api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=args.url, headers=headers, timeout=args.timeout, limits=limits) as client:
        if args.model is None:
            args.model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        load = Load(args, client)
        for i in range(args.warmup):
            await load.request(args.requests + i)
        results, seconds = await run(args, load.request)
    return summary(results, seconds), results


def main(arguments: list[str] | None = None) -> int:
    """Prints the numbers, and writes them as JSON; status 1 if a request failed."""
    args = parser().parse_args(arguments)
    try:
        numbers, results = asyncio.run(bench(args))
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


def _range(text: str) -> tuple[int, int]:
    """ "7" or "1..1000"."""
    low, _, high = text.partition("..")
    bounds = int(low), int(high or low)
    if not 1 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of lengths, as in 128 or 1..1000")
    return bounds


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size of a picture, as in 1280x720")
    return int(width), int(height)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, as in '{{\"top_p\": 0.8}}'")
    return found


def _response_format(path: str) -> dict[str, Any]:
    """OpenAI's response_format, or a JSON schema that is put into one, from a file."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{path} holds {found!r}, expected a response_format or a JSON schema")
    if found.get("type") in ("text", "json_object", "json_schema"):
        return found
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": found}}


def parser() -> argparse.ArgumentParser:
    """Of its command line."""
    parser = argparse.ArgumentParser(prog="python -m serve.bench", description="Load an OpenAI-compatible server and time it.")
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    add("--model", help="default: the first that the server names")
    add("--api-key")
    add("--requests", type=int, default=100, help="requests, or conversations with --turns (default: %(default)s)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--concurrency", type=int, default=1, help="requests under way at once (default: %(default)s)")
    how.add_argument("--rate", type=float, help="requests a second, at random times, instead")
    add("--input-len", metavar="N[..M]", type=_range, default=(128, 128), help="tokens of a prompt; in chats words")
    add("--output-len", metavar="N[..M]", type=_range, default=(128, 128), help="tokens of an answer")
    add("--ids", type=int, default=30_000, help="prompts are drawn from the ids below this (default: %(default)s)")
    add("--chat", action="store_true", help="words to chat completions, instead of token ids to completions")
    add("--response-format", metavar="FILE", type=_response_format, help="a response_format, or a JSON schema, for chats")
    add("--image", metavar="WxH", type=_size, help="begin each prompt with random pictures of this size")
    add("--images", type=int, default=1, help="how many (default: %(default)s)")
    add("--turns", type=int, default=1, help="turns of a conversation (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="default: %(default)s")
    add(
        "--extra-body",
        "--extra-request-body",
        metavar="JSON",
        type=_object,
        default={},
        help="what each request says as well, such as '{\"top_p\": 0.8}'",
    )
    add("--seed", type=int, default=0, help="of what is drawn: the same again, and the server may know it (default: %(default)s)")
    add("--warmup", type=int, default=1, help="requests before the clock starts (default: %(default)s)")
    add("--timeout", type=float, default=600.0, help="seconds a server may be silent (default: %(default)s)")
    add("--output", metavar="FILE", type=Path, help="write the numbers as JSON too")
    return parser
