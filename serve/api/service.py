"""What the routes share."""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from minicpmv46_jax import MiniCPMV
from serve.engine import Engine

MAX_BODY_BYTES = 128 * 2**20  # base64 makes of it 96 MiB of pictures or video
PREPARE_THREADS = 8  # decoding and resizing let go of the GIL; a slow URL holds one of them

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Service:
    """A model being served.

    Attributes:
      model: prepares requests, in threads of `pool`.
      engine: answers them.
      name: what clients call the model.
      api_key: what clients must show; None lets everyone in.
      max_body_bytes: most bytes of a request's body.
      created: when serving began, in seconds since 1970.
      pool: where requests are prepared, off the event loop.
    """

    model: MiniCPMV
    engine: Engine
    name: str
    api_key: str | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    pool: ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="prepare")
    )

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self.engine.max_model_len

    async def in_thread(self, function: Callable[..., T], *args) -> T:
        """Runs a function that takes its time without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)

    def close(self) -> None:
        """Stops the engine and takes on no more preparations."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.engine.close()
