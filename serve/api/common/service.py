"""What the routes share."""

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

MAX_BODY_BYTES = 128 * 2**20  # base64 makes of it 96 MiB of pictures or video
MEDIA_LIMITS = {"image": 128, "video": 16}  # of one request
PREPARE_THREADS = 8  # decoding and resizing let go of the GIL; a slow URL holds one of them

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Cors:
    """Which web pages of other origins may ask, and how; see Starlette's CORSMiddleware."""

    allow_origins: tuple[str, ...]
    allow_methods: tuple[str, ...] = ("*",)
    allow_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False


@dataclasses.dataclass(frozen=True)
class Service:
    """A model being served.

    Attributes:
      model: prepares requests, in threads of `pool`.
      engine: answers them.
      name: what clients call the model.
      aliases: what they may call it as well.
      api_keys: of which clients must show one; none lets everyone in.
      max_body_bytes: most bytes of a request's body.
      media_limits: most images and most videos of a request.
      cors: which web pages may ask; None for those of this server alone.
      restore_newlines: whether a written backslash-n becomes a line break where a request does not say.
      demo: whether the model is the one that comes with the package; the page then offers pictures that it can answer about.
      log_prompts: whether the log has the text of prompts. They are the users' own, so it has not unless asked.
      created: when serving began, in seconds since 1970.
      pool: where requests are prepared, off the event loop.
      image_workers: the processes in which the model's processor opens pictures, if it has any, to be closed with the rest.
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
        """All that the model answers to."""
        return (self.name, *self.aliases)

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self.engine.max_model_len

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self.model.config.text.vocab_size

    @functools.cached_property
    def grammar_compiler(self) -> GrammarCompiler:
        """What keeps answers to a form."""
        model = self.model
        return GrammarCompiler(model.detokenizer, self.tokenize, self.vocabulary, model.generation_config.stop_token_ids)

    def tokenize(self, text: str) -> list[int]:
        """A text's tokens, without any of the template's."""
        return self.model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    async def in_thread(self, function: Callable[..., T], *args) -> T:
        """Runs a function that takes its time without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)

    def close(self) -> None:
        """Stops the engine and takes on no more preparations."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.image_workers is not None:
            self.image_workers.close()
        self.engine.close()
