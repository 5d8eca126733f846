"""Sends the cases of a fuzzer to a server, and reports the answers that no client may cause."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx

CONCURRENCY = 16
PATIENCE_S = 30.0
SETTLE_S = 10.0
MAX_FINDINGS = 50
IDLE_GAUGES = ("running", "reading", "waiting", "places_taken")
SERVER_ERRORS = {"server_error", "api_error", "internal_error"}
TINY_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAIAAAD9b0jDAAAAJUlEQVR4nGP8z0B9wEQDM0cNHTV01NBRQ0cNHTV01NBRQwehoQBP5wE3s4x89AAAAABJ"
    "RU5ErkJggg=="
)  # 28 x 28, red


@dataclasses.dataclass(frozen=True)
class Case:
    """One request; its bytes are sent as they are, valid HTTP or not.

    Attributes:
      label: a short description of the kind of case.
    """

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    label: str = ""

    def encode(self, host: str) -> bytes:
        """Returns the bytes to send."""
        given = {name.lower() for name, _ in self.headers}
        headers = [(b"Host", host.encode()), (b"Connection", b"close"), *self.headers]
        if b"content-length" not in given and b"transfer-encoding" not in given and (self.body or self.method == "POST"):
            headers.append((b"Content-Length", str(len(self.body)).encode()))
        start = f"{self.method} {self.path} HTTP/1.1".encode("utf-8", "surrogateescape")
        return b"\r\n".join([start, *(name + b": " + value for name, value in headers), b"", self.body])


DIRECTED_SHARE = 0.02  # of the cases, and half of the first ones


def is_directed(rng: random.Random, index: int, number: int) -> bool:
    """Returns whether a case is one of `number` directed ones; a short run meets many of them."""
    return rng.random() < (0.5 if index < 2 * number else DIRECTED_SHARE)


CaseMaker = Callable[[random.Random, int, str], Case]  # random numbers of the case, its index, the model's name


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response: status, headers with lowercase names, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def problem(self) -> str | None:
        """Returns why no client should get this answer, or None."""
        if self.status >= 500:
            return f"status {self.status}: {self.body[:300]!r}"
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            return next((f"error event {event!r}"[:400] for event in self.events() if is_server_error(event)), None)
        return None

    def events(self) -> Iterator[object]:
        """Yields the objects of a stream of events."""
        for line in self.body.split(b"\n"):
            with contextlib.suppress(ValueError):
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])


def is_server_error(event: object) -> bool:
    """Returns whether an event of any dialect reports a fault of the server."""
    if not isinstance(event, dict):
        return False
    inner = event.get("response")
    found = [event if event.get("type") == "error" else None, event.get("error"), inner.get("error") if inner else None]
    return any(SERVER_ERRORS & {error.get("type"), error.get("code")} for error in found if isinstance(error, dict))


@dataclasses.dataclass(frozen=True)
class Usage:
    """What the process of a server holds, from /proc; a child's own descendants are not counted."""

    rss_mib: int
    threads: int
    descriptors: int
    children: int
    shm: int

    @classmethod
    def of(cls, pid: int) -> "Usage":
        process = Path("/proc", str(pid))
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        children = sum(len(path.read_text().split()) for path in process.glob("task/*/children"))
        shm = len(list(Path("/dev/shm").iterdir()))
        rss = int(status["VmRSS"].split()[0]) // 1024
        return cls(rss, int(status["Threads"]), len(list((process / "fd").iterdir())), children, shm)

    def growth(self, later: "Usage") -> list[str]:
        """Returns the counts that have grown by more than a pool's last threads and open connections."""
        slack = {"threads": CONCURRENCY, "descriptors": 2 * CONCURRENCY, "children": 0, "shm": 0}
        pairs = [(name, getattr(self, name), getattr(later, name), more) for name, more in slack.items()]
        return [f"{name} grew from {before} to {after}" for name, before, after, more in pairs if after > before + more]


@dataclasses.dataclass
class Report:
    """What a run found.

    Attributes:
      sent: number of cases.
      statuses: number of answers by status.
      findings: one line each.
      gone: True once the server refuses connections.
      slowest: seconds of the slowest answer, and its index.
    """

    sent: int = 0
    statuses: dict[int, int] = dataclasses.field(default_factory=dict)
    findings: list[str] = dataclasses.field(default_factory=list)
    gone: bool = False
    slowest: tuple[float, int] = (0.0, -1)


@dataclasses.dataclass
class Fuzzer:
    """A kind of cases, and the server that they are sent to.

    Attributes:
      name: the kind: "http", "media" or "schemas".
      make: makes a case.
      url: the server's address.
      seed: decides all cases together with their indices.
      pid: the server's process; None checks nothing of it.
      folder: where the request of a finding is written.
      patience_s: seconds after which a missing answer is a finding.
      concurrency: requests at once.
    """

    name: str
    make: CaseMaker
    url: str
    seed: int
    pid: int | None = None
    folder: Path = Path("fuzz-findings")
    patience_s: float = PATIENCE_S
    concurrency: int = CONCURRENCY

    def case(self, index: int) -> Case:
        """Returns one case, the same in every run."""
        return self.make(random.Random(f"{self.name} {self.seed} {index}"), index, self.model)

    @functools.cached_property
    def model(self) -> str:
        """The served model's name."""
        return httpx.get(f"{self.url}/v1/models", timeout=self.patience_s).json()["data"][0]["id"]

    def run(self, number: int | None = None, seconds: float | None = None, first: int = 0) -> Report:
        """Sends `number` cases, or as many as `seconds` allow, and checks the server before and after."""
        report = Report()
        known = self.known_answer()
        indices = range(first, first + number) if number is not None else itertools.count(first)
        end = None if seconds is None else time.monotonic() + seconds
        usages = asyncio.run(self._send_all(iter(indices), number, end, report))
        self._check_after(report, known, usages)
        return report

    def known_answer(self) -> str:
        """Returns the model's answer to a question with a picture, which no other request may change."""
        picture = {"type": "image_url", "image_url": {"url": data_url(TINY_PNG, "image/png")}}
        messages = [{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}]
        body = {"model": self.model, "messages": messages, "max_tokens": 8, "temperature": 0, "seed": 1}
        response = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=4 * self.patience_s)
        return response.raise_for_status().json()["choices"][0]["message"]["content"]

    async def _send_all(self, indices: Iterator[int], number: int | None, end: float | None, report: Report) -> list[Usage]:
        usages: list[Usage] = []

        async def worker() -> None:
            for index in indices:
                if report.gone or (end is not None and time.monotonic() > end) or len(report.findings) >= MAX_FINDINGS:
                    return
                await self._try(index, report)
                if self.pid is not None and len(usages) < 1 and self._half_done(report.sent, number, end, started):
                    usages.append(Usage.of(self.pid))

        started = time.monotonic()
        await asyncio.gather(*(worker() for _ in range(self.concurrency)))
        return usages

    @staticmethod
    def _half_done(sent: int, number: int | None, end: float | None, started: float) -> bool:
        by_number = number is not None and sent >= number / 2
        return by_number or (end is not None and time.monotonic() > (started + end) / 2)

    async def _try(self, index: int, report: Report) -> None:
        case = self.case(index)
        start = time.monotonic()
        try:
            async with asyncio.timeout(self.patience_s):
                answer = await send(self.url, case)
            problem = answer.problem()
            report.statuses[answer.status] = report.statuses.get(answer.status, 0) + 1
        except TimeoutError:
            problem = f"no answer in {self.patience_s:g} s"
        except ConnectionRefusedError:
            report.gone, problem = True, "the server is gone; a case that got no answer before it has ended it"
        except (OSError, EOFError, ValueError) as error:
            problem = f"no answer: {type(error).__name__} {error}"
        report.sent += 1
        report.slowest = max(report.slowest, (round(time.monotonic() - start, 2), index))
        if problem is not None:
            self._found(report, index, case, problem)

    def _found(self, report: Report, index: int, case: Case, problem: str) -> None:
        path = write_curl(self.folder / f"{self.name}-{self.seed}-{index}", self.url, case)
        line = f"{self.name} seed {self.seed} index {index} ({case.label}): {problem}; curl --config {path}"
        print(line, flush=True)
        report.findings.append(line)

    def _check_after(self, report: Report, known: str, usages: list[Usage]) -> None:
        printed = len(report.findings)
        try:
            if (again := self.known_answer()) != known:
                report.findings.append(f"the known answer was {known!r} and is {again!r}")
            report.findings += patiently(lambda: busy_gauges(self.url))
        except (httpx.HTTPError, KeyError) as error:
            report.findings.append(f"the server is no longer well: {error!r}")
        if self.pid is not None and usages and Path("/proc", str(self.pid)).exists():
            report.findings += patiently(lambda: usages[0].growth(Usage.of(self.pid)))
            last = Usage.of(self.pid)
            print(f"half-way {usages[0]}, at the end {last}")
        print(f"{self.name} seed {self.seed}: {report.sent} sent, statuses {report.statuses}, slowest {report.slowest}")
        print(f"{len(report.findings)} findings", *report.findings[printed:], sep="\n", flush=True)


def busy_gauges(url: str) -> list[str]:
    """Returns the gauges that are not zero although nothing is asked."""
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
    gauges = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("minicpmv46_"))
    return [f"{name} is {gauges[f'minicpmv46_{name}']}" for name in IDLE_GAUGES if float(gauges[f"minicpmv46_{name}"])]


def patiently(problems: Callable[[], list[str]]) -> list[str]:
    """Returns the problems that remain after SETTLE_S, in which requests end whose client has left."""
    end = time.monotonic() + SETTLE_S
    while (found := problems()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


async def send(url: str, case: Case) -> Answer:
    """Sends a case on its own connection. Raises OSError, EOFError or ValueError if no valid answer comes."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(case.encode(address.netloc))
        received = await read_all(reader)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return parse_answer(received)


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """Reads to the end of the connection.

    A reset after the answer's head counts as the end: a server does not read all of a refused request.
    """
    received = b""
    try:
        while piece := await reader.read(2**16):
            received += piece
    except ConnectionResetError:
        if b"\r\n\r\n" not in received:
            raise
    return received


def parse_answer(received: bytes) -> Answer:
    """Parses the first final response of a connection. Raises EOFError if there is none."""
    head, _, body = received.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 1"):  # 100 Continue
        head, _, body = body.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        raise EOFError(f"the connection was closed after {received[:100]!r}")
    start, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    chunked = headers.get("transfer-encoding") == "chunked"
    return Answer(int(start.split()[1]), headers, b"".join(chunks(body)) if chunked else body)


def chunks(body: bytes) -> Iterator[bytes]:
    """Yields the data of a chunked body. Raises EOFError if it is cut."""
    while body:
        size_line, _, rest = body.partition(b"\r\n")
        if (size := int(size_line, 16)) == 0:
            return
        yield rest[:size]
        body = rest[size + 2 :]
    raise EOFError("the response was cut")


def write_curl(path: Path, url: str, case: Case) -> Path:
    """Writes a request as a configuration of curl beside its body and its raw bytes; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body, config = path.with_suffix(".body"), path.with_suffix(".curl")
    body.write_bytes(case.body)
    path.with_suffix(".raw").write_bytes(case.encode(urlsplit(url).netloc))
    fields = [("url", url + case.path), ("request", case.method)]
    fields += [("header", f"{name.decode('latin-1')}: {value.decode('latin-1')}") for name, value in case.headers]
    fields += [("data-binary", f"@{body}")] if case.body else []
    quoted = [f'{name} = "{value}"' for name, value in ((n, v.replace("\\", "\\\\").replace('"', '\\"')) for n, v in fields)]
    config.write_text("\n".join(quoted) + "\n", errors="surrogateescape")
    return config


def data_url(data: bytes, kind: str) -> str:
    """Returns bytes as a `data:` URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def json_case(path: str, body: object, label: str = "") -> Case:
    """Returns a POST of JSON."""
    return Case("POST", path, json.dumps(body).encode(), ((b"Content-Type", b"application/json"),), label)
