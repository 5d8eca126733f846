"""Rate of ordinary streams while hostile requests arrive in a loop; see `python -m tests.fuzz.attack --help`.

For each attack: 16 streams run alone, then beside `--connections` connections that send the hostile input
again and again, then alone once more. The table has the streams' tokens a second of each phase, the ratio of
the attacked phase to the mean of the other two, and the statuses that the attack received.
"""

import argparse
import asyncio
import base64
import io
import json
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import httpx
from PIL import Image

STREAMS = 16
Attack = Callable[[], dict]


def chat(content, **fields):
    """Returns (path, body) of a chat request."""
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}


def image(url):
    """Returns a content part."""
    return {"type": "image_url", "image_url": {"url": url}}


def data_url(content, kind):
    """Returns a data URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def encoded(picture, kind, **options):
    """Returns an image file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chain_of_references(number=1500):
    """Returns a schema of definitions that refer to each other in a chain."""
    refs = {f"r{i}": {"anyOf": [{"$ref": f"#/$defs/r{i + 1}"}, {"type": "null"}]} for i in range(number)}
    schema = {"$defs": {**refs, f"r{number}": {"type": "null"}}, "$ref": "#/$defs/r0"}
    return chat("x", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def chain_of_rules(number=3000):
    """Returns a grammar of rules that refer to each other in a chain."""
    rules = "\n".join(f"r{i}: r{i + 1}" for i in range(number))
    return chat("x", structured_outputs={"grammar": f'start: r0\n{rules}\nr{number}: "a"'})


def long_video() -> bytes:
    """Returns an AVI of three frames that lasts nine years by its header."""
    import av
    import numpy as np

    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 16
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))))
        container.mux(stream.encode())
    content = bytearray(file.getvalue())
    struct.pack_into("<II", content, content.index(b"strh") + 28, 100_000_000, 1)
    return bytes(content)


def slow_video():
    """Returns a request for all frames of the long video."""
    part = {"type": "video_url", "video_url": {"url": data_url(long_video(), "video/avi")}}
    return chat([part], mm_processor_kwargs={"max_num_frames": 65536})


def many_slices():
    """Returns three images of one colour that have 445 slices each."""
    part = image(data_url(encoded(Image.new("1", (9400, 9400)), "PNG"), "image/png"))
    return chat([part] * 3, mm_processor_kwargs={"max_slice_nums": 4096})


def many_scans():
    """Returns a JPEG of 81 megapixels with 1,200 empty scans."""
    plain = encoded(Image.new("L", (9000, 9000)), "JPEG", progressive=True)
    scan = plain.rindex(b"\xff\xda")
    content = plain[:scan] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" * 1200 + plain[scan:]
    return chat([image(data_url(content, "image/jpeg"))])


def bodies(drip: str) -> dict[str, tuple[str, dict]]:
    """Returns the attacks that are one request: (path, body) by name. `drip` is the URL of a slow picture."""
    large = data_url(encoded(Image.new("RGB", (9400, 9400), "red"), "PNG"), "image/png")
    return {
        "C1 chain of 1,500 $refs": chain_of_references(),
        "C1 chain of 3,000 rules": chain_of_rules(),
        "C1 regex a? 20,000 times": chat("x", structured_outputs={"regex": "a?" * 20_000}),
        "C1 nested repetitions": chat("x", structured_outputs={"regex": "((a{1,100}){1,100}){1,100}"}),
        "C1 100,000 choices": chat("x", structured_outputs={"choice": [f"choice {i}" for i in range(100_000)]}),
        "C2 slow URLs": chat([image(drip)] * 8),
        "C3 video of a hundred years": slow_video(),
        "C4 three images of 445 slices": many_slices(),
        "C4 image of 88 megapixels": chat([image(large)]),
        "M2 JPEG of 1,200 scans": many_scans(),
        "M3 20 MB of text": chat("word " * 4_000_000),
        "M3 2 MB of text": chat("word " * 400_000),
        "M3 5,000,000 empty objects": ("/tokenize", {"prompt": "x", "x": [{}] * 5_000_000}),
        "M3 60,000 empty objects": ("/tokenize", {"prompt": "x", "x": [{}] * 60_000}),
        "M4 20,000 stop texts": chat("x", stop=[f"never {i}" for i in range(20_000)], max_tokens=200),
        "M4 as many stop texts as allowed": chat("x", stop=[f"never {i}" for i in range(256)], max_tokens=200),
        "100,000 messages": ("/v1/messages", {"max_tokens": 4, "messages": [{"role": "user", "content": 1}] * 100_000}),
    }


class Streams:
    """Ordinary streams that start again when they end, and their tokens."""

    def __init__(self, url: str, model: str):
        self.tokens = self.failed = 0
        self._url, self._model = url, model

    async def run(self) -> None:
        """Runs until it is cancelled."""
        limits = httpx.Limits(max_connections=STREAMS)
        async with httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits) as http:
            await asyncio.gather(*(self._stream(http, i) for i in range(STREAMS)))

    async def _stream(self, http: httpx.AsyncClient, index: int) -> None:
        body = {"model": self._model, "prompt": f"Story {index}:", "max_tokens": 400, "ignore_eos": True, "stream": True}
        while True:
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    self.tokens += line.startswith("data: {")
                    self.failed += '"error"' in line
            if answer.status_code != 200:
                self.failed += 1
                await asyncio.sleep(0.1)

    async def rate(self, seconds: float) -> float:
        """Returns tokens a second over the next seconds."""
        before, begun = self.tokens, time.monotonic()
        await asyncio.sleep(seconds)
        return (self.tokens - before) / (time.monotonic() - begun)


async def send_again(http: httpx.AsyncClient, path: str, body: bytes, statuses: Counter) -> None:
    """Sends one request in a loop."""
    while True:
        try:
            answer = await http.post(path, content=body, headers={"Content-Type": "application/json"})
            statuses[answer.status_code] += 1
        except httpx.TransportError as error:
            statuses[type(error).__name__] += 1
            await asyncio.sleep(0.05)


async def send_headers(url: str, statuses: Counter) -> None:
    """Sends 60 MB of one header in a loop."""
    parts = urlsplit(url)
    while True:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Filler: ")
            for _ in range(60):
                writer.write(b"a" * 2**20)
                await writer.drain()
            writer.write(b"\r\n\r\n")
            await writer.drain()
            statuses[(await reader.readline())[9:12].decode() or "closed"] += 1
        except OSError:
            statuses["closed"] += 1
        finally:
            writer.close()


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends a picture a byte every three seconds."""
    try:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(3)
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def measure(args: argparse.Namespace, name: str, attack: list[Awaitable], streams: Streams, statuses: Counter) -> float:
    """Prints a row of the table and returns the ratio."""
    alone = await streams.rate(args.seconds)
    tasks = [asyncio.ensure_future(one) for one in attack]
    await asyncio.sleep(1)
    beside = await streams.rate(args.seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(2)
    after = await streams.rate(args.seconds)
    ratio = beside / max((alone + after) / 2, 1e-9)
    answers = ", ".join(f"{status}: {count}" for status, count in statuses.items()) or "none ended"
    print(f"| {name} | {alone:.0f} | {beside:.0f} | {after:.0f} | {ratio:.2f} | {answers} |", flush=True)
    return ratio


async def run(args: argparse.Namespace) -> int:
    """Runs all attacks. Returns 1 if streams failed or kept less than half of their rate, else 0."""
    async with httpx.AsyncClient(base_url=args.url, timeout=120) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        site = await asyncio.start_server(drip, "127.0.0.1", 0)
        port = site.sockets[0].getsockname()[1]
        attacks = bodies(f"http://127.0.0.1:{port}/picture.png")
        streams = Streams(args.url, model)
        running = asyncio.ensure_future(streams.run())
        await streams.rate(2 * args.seconds)
        print("| attack | alone | attacked | after | ratio | statuses of the attack |\n|---|---|---|---|---|---|")
        ratios = []
        for name, (path, body) in attacks.items():
            if args.only and args.only not in name:
                continue
            content, statuses = json.dumps({"model": model, **body}).encode(), Counter()
            attack = [send_again(http, path, content, statuses) for _ in range(args.connections)]
            ratios.append(await measure(args, name, attack, streams, statuses))
        if not args.only or "M1" in args.only:
            statuses = Counter()
            attack = [send_headers(args.url, statuses) for _ in range(args.connections)]
            ratios.append(await measure(args, "M1 header of 60 MB", attack, streams, statuses))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        print(f"lowest ratio {min(ratios):.2f}; failed streams {streams.failed}")
        return int(min(ratios) < 0.5 or streams.failed > 0)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.attack", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="a server with --allowed-media-networks 127.0.0.0/8")
    parser.add_argument("--connections", type=int, default=4, help="that send the hostile input (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=8, help="of each phase (default: %(default)s)")
    parser.add_argument("--only", help="part of the names of the attacks to run")
    raise SystemExit(asyncio.run(run(parser.parse_args())))


if __name__ == "__main__":
    main()
