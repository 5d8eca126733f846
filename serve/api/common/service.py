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
from serve.multimodal.image_workers import ImageWorkerPool
from serve.structured_output.grammar import GrammarCompiler

MAX_BODY_BYTES = 128 * 2**20  # holds 96 MiB of images or video in base64
MEDIA_LIMITS = {"image": 128, "video": 16}  # per request
PREPARE_THREADS = 8  # image decoding releases the GIL; a slow URL occupies one thread

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Cors:
    """Options for pages of other origins; see Starlette's CORSMiddleware."""

    allow_origins: tuple[str, ...]
    allow_methods: tuple[str, ...] = ("*",)
    allow_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False


@dataclasses.dataclass(frozen=True)
class Service:
    """A served model.

    Attributes:
      model: prepares requests, in threads of `pool`.
      engine: runs requests.
      name: the model's name in responses.
      aliases: further names that requests may use.
      api_keys: accepted API keys (`Authorization: Bearer KEY`); none disables authentication.
      max_body_bytes: maximum length of a request's body.
      media_limits: maximum number of images and of videos per request.
      cors: options for pages of other origins; None refuses them.
      restore_newlines: default of the request field `restore_newlines`.
      demo: True for the package's own demo model; the page then offers scenes that the model can answer
        about.
      log_prompts: True to log the text of prompts, which is private.
      created: start of the service, in seconds since 1970.
      pool: threads that prepare requests, off the event loop.
      image_workers: processes in which the model's processor decodes images, if any; closed with the service.
    """

    model: MiniCPMV
    engine: Engine
    name: str
    aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    media_limits: Mapping[str, int] = dataclasses.field(default_factory=lambda: MEDIA_LIMITS)
    cors: Cors | None = None
    restore_newlines: bool = False
    demo: bool = False
    log_prompts: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    pool: ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="prepare")
    )
    image_workers: ImageWorkerPool | None = None

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
        return GrammarCompiler(model.detokenizer, self.tokenize, self.vocab_size, model.generation_config.stop_token_ids)

    def tokenize(self, text: str) -> list[int]:
        """Returns a text's token ids, without special tokens."""
        return self.model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    async def run_in_thread(self, function: Callable[..., T], *args) -> T:
        """Runs a slow function in a thread of `pool`, so that the event loop stays responsive."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)

    def close(self) -> None:
        """Stops the engine and cancels waiting preparations."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.image_workers is not None:
            self.image_workers.close()
        self.engine.close()
