"""The service: a model, its engine and the server's options, shared by all routes."""

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from minicpmv46_jax import MiniCPMV
from serve.engine.engine import Engine
from serve.multimodal.image_workers import ImageThreads, MediaWorkers
from serve.multimodal.media_fetcher import MediaFetcher
from serve.multimodal.media_loader import MediaLoader
from serve.runtime.budget import Budget, RequestMemory
from serve.runtime.paced_thread import PacedThread
from serve.runtime.worker_pool import WorkerPool
from serve.structured_output.grammar import GrammarCompiler

MAX_BODY_BYTES = 128 * 2**20  # holds 96 MiB of images or video in base64
MEDIA_LIMITS = {"image": 128, "video": 16}  # per request
REQUEST_MEMORY_BYTES = 8 * 2**30
SMALL_BYTES = 2**14  # bodies up to this size are checked in a few milliseconds
HUGE_BYTES = 2**22  # a photograph in base64 is smaller
LARGE_BYTES = 2**18  # a body with a photograph, or the text of some 60,000 tokens
LARGE_PREPARE_THREADS = 4
PREPARE_THREADS = 8  # the tokenizer releases the GIL

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Cors:
    """Options for pages of other origins; see Starlette's CORSMiddleware."""

    allow_origins: tuple[str, ...]
    allow_methods: tuple[str, ...] = ("*",)
    allow_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False


@dataclasses.dataclass(eq=False)
class Service:
    """A served model.

    Attributes:
      model: prepares requests, in threads.
      engine: runs requests.
      name: the model's name in responses.
      aliases: further names that requests may use.
      api_keys: accepted API keys (`Authorization: Bearer KEY`); none disables authentication.
      max_body_bytes: maximum length of a request's body.
      media_limits: maximum number of images and of videos per request.
      allowed_hosts: host names that requests may be sent to; none allows all.
      cors: options for pages of other origins; None refuses them.
      restore_newlines: default of the request field `restore_newlines`.
      demo: True for the package's own demo model; the page then offers scenes that the model can answer
        about.
      log_prompts: True to log the text of prompts, which is private.
      created: start of the service, in seconds since 1970.
      fetcher: the rules for URLs and paths of media.
      media_workers: measure and decode media; closed with the service.
      memory_bytes: host memory of all requests together: half of it for bodies and downloads, half for
        decoded images.
      trial_workers: processes in which grammars are tried, from `start_trial_workers`; closed with the
        service. None tries none.
    """

    model: MiniCPMV
    engine: Engine
    name: str
    aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    media_limits: Mapping[str, int] = dataclasses.field(default_factory=lambda: MEDIA_LIMITS)
    allowed_hosts: tuple[str, ...] = ()
    cors: Cors | None = None
    restore_newlines: bool = False
    demo: bool = False
    log_prompts: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    fetcher: MediaFetcher = dataclasses.field(default_factory=MediaFetcher)
    media_workers: MediaWorkers = dataclasses.field(default_factory=ImageThreads)
    memory_bytes: int = REQUEST_MEMORY_BYTES
    trial_workers: WorkerPool | None = None

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="prepare")
        self._large_threads = ThreadPoolExecutor(LARGE_PREPARE_THREADS, thread_name_prefix="prepare-large")
        self._paced = [PacedThread(f"check-{name}") for name in ("large", "huge")]
        self._sources, self._pixels = Budget(self.memory_bytes // 2), Budget(self.memory_bytes // 2)
        self.preparing: set[asyncio.Future] = set()  # of requests that the engine does not have yet
        self.media = MediaLoader(self.fetcher, self.media_workers, self.run_in_thread)

    @property
    def names(self) -> tuple[str, ...]:
        """All names that requests may use for the model."""
        return (self.name, *self.aliases)

    @property
    def max_model_len(self) -> int:
        """Maximum tokens of a prompt and its answer."""
        return self.engine.max_model_len

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        return self.model.config.text.vocab_size

    @functools.cached_property
    def grammar_compiler(self) -> GrammarCompiler:
        """Compiler of structured-output grammars."""
        model = self.model
        stops = model.generation_config.stop_token_ids
        run_check = functools.partial(self.run_check, size=SMALL_BYTES + 1)
        return GrammarCompiler(model.detokenizer, self.tokenize, self.vocab_size, stops, self.trial_workers, run_check)

    def tokenize(self, text: str) -> list[int]:
        """Returns a text's token ids, without special tokens."""
        return self.model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def request_memory(self) -> RequestMemory:
        """Returns the record of a new request's host memory."""
        return RequestMemory(self._sources, self._pixels)

    async def run_in_thread(self, function: Callable[..., T], *args, size: int = 0) -> T:
        """Runs a slow function in a thread, so that the event loop stays responsive.

        Args:
          function: the function.
          *args: its arguments.
          size: bytes that it works on. Large ones have threads of their own, so that they delay no small one.
        """
        threads = self._threads if size <= LARGE_BYTES else self._large_threads
        return await asyncio.get_running_loop().run_in_executor(threads, function, *args)

    async def run_check(self, function: Callable[..., T], *args, size: int) -> T:
        """Runs a function that checks a body and holds Python's lock meanwhile.

        Large bodies are checked one at a time in a share of the time, and huge ones apart from large ones.

        Args:
          function: the function.
          *args: its arguments.
          size: bytes of the body.
        """
        if size <= SMALL_BYTES:
            return await self.run_in_thread(function, *args)
        return await self._paced[size > HUGE_BYTES].run(function, *args)

    def stop(self) -> None:
        """Gives up all requests with status 503, those in preparation too. Called in the event loop."""
        self.engine.stop()
        for future in self.preparing:
            future.cancel()

    def close(self) -> None:
        """Stops the engine and cancels waiting preparations."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._large_threads.shutdown(wait=False, cancel_futures=True)
        for thread in self._paced:
            thread.close()
        self.media.close()
        if self.trial_workers is not None:
            self.trial_workers.close()
        self.engine.close()
