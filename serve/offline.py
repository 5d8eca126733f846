"""Offline inference over many conversations at once, without HTTP.

from minicpmv46_jax import MiniCPMV
from serve.offline import Offline

with Offline(MiniCPMV.from_pretrained("openbmb/MiniCPM-V-4.6")) as offline:
    texts = offline.chat([[{"role": "user", "content": question}] for question in questions], temperature=0.0)
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from tqdm import tqdm

from minicpmv46_jax import MiniCPMV
from serve.api.common.service import PREPARE_THREADS
from serve.engine.engine import QueuePolicy
from serve.engine.engine_client import EngineClient
from serve.engine.memory_plan import EngineConfig
from serve.runtime.cache_dir import cache_folder
from serve.runtime.startup import MEMORY_FRACTION, DeviceConfig, check_backend, make_engine

MAX_IN_FLIGHT = 32  # conversations being prepared or answered; their images are in memory

Conversation = Sequence[Mapping[str, Any]]


class Offline:
    """A model behind the server's engine. `close` it, or use it as a context manager.

    Args:
      model: the model that answers.
      engine: an engine over it; None makes one as large as the device's memory allows.
      backend: kernels of an engine made here: "reference", "hopper", "tpu", or None for the fastest that
        serves the model.

    Raises:
      ValueError: the backend cannot run on the device, or there is an engine already.
    """

    def __init__(self, model: MiniCPMV, engine: EngineClient | None = None, backend: str | None = None):
        if engine is not None and backend is not None:
            raise ValueError(f"backend is {backend!r}, but the engine given has its kernels already")
        self._model, self._engine = model, engine or self._make_engine(model, backend)
        self._pool = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="prepare")

    @staticmethod
    def _make_engine(model: MiniCPMV, backend: str | None) -> EngineClient:
        check_backend(backend)
        device_config = DeviceConfig(jax.default_backend(), MEMORY_FRACTION, cache_folder(), backend)
        return make_engine(model, device_config, EngineConfig(), QueuePolicy())

    def __enter__(self) -> "Offline":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stops the engine."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._engine.close()

    def chat(self, conversations: Iterable[Conversation], progress: bool = True, **options: Any) -> list[str]:
        """Returns the answers in the order of the conversations.

        Args:
          conversations: lists of messages as `MiniCPMV.chat` takes them.
          progress: whether to draw a progress bar on a terminal.
          **options: options of `MiniCPMV.chat`, for all conversations.

        Raises:
          ValueError: an option or a conversation is not valid; the message has the conversation's index.
        """
        try:
            return asyncio.run(self._chat(list(conversations), progress, options))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None  # the other tasks were only cancelled

    async def _chat(self, conversations: list[Conversation], progress: bool, options: Mapping[str, Any]) -> list[str]:
        in_flight = asyncio.Semaphore(MAX_IN_FLIGHT)
        with tqdm(total=len(conversations), unit="answer", disable=None if progress else True) as bar:
            async with asyncio.TaskGroup() as group:
                answers = [
                    group.create_task(self._answer(i, conversation, options, in_flight, bar))
                    for i, conversation in enumerate(conversations)
                ]
        return [answer.result() for answer in answers]

    async def _answer(
        self, index: int, conversation: Conversation, options: Mapping[str, Any], in_flight: asyncio.Semaphore, bar: tqdm
    ) -> str:
        async with in_flight:
            handle = self._engine.reserve()
            try:
                loop = asyncio.get_running_loop()
                handle.submit(*await loop.run_in_executor(self._pool, self._prepare, index, conversation, options))
                text = "".join([delta.text async for delta in handle.deltas()])
            finally:
                handle.close()
        bar.update()
        return text

    def _prepare(self, index: int, conversation: Conversation, options: Mapping[str, Any]) -> tuple:
        try:
            return self._model.prepare(conversation, options)
        except ValueError as error:
            raise ValueError(f"conversation {index}: {error}") from error
