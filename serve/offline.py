"""Many conversations at once, without HTTP.

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
from serve.runtime.startup import MEMORY_FRACTION, Place, make_engine

AT_ONCE = 32  # conversations being prepared or answered; their pictures are in memory

Conversation = Sequence[Mapping[str, Any]]


class Offline:
    """A model behind the server's engine. `close` it, or use it as a context manager.

    Args:
      model: what answers.
      engine: an engine over it; None makes one of the size that the device has room for.
    """

    def __init__(self, model: MiniCPMV, engine: EngineClient | None = None):
        self._model, self._engine = model, engine or self._fitting(model)
        self._pool = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="prepare")

    @staticmethod
    def _fitting(model: MiniCPMV) -> EngineClient:
        return make_engine(model, Place(jax.default_backend(), MEMORY_FRACTION, cache_folder()), EngineConfig(), QueuePolicy())

    def __enter__(self) -> "Offline":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stops the engine."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._engine.close()

    def chat(self, conversations: Iterable[Conversation], progress: bool = True, **options: Any) -> list[str]:
        """The answers, in the conversations' order.

        Args:
          conversations: messages as `MiniCPMV.chat` takes them.
          progress: draw a bar on a terminal.
          **options: as `MiniCPMV.chat` takes them, for all.

        Raises:
          ValueError: what is wrong with an option or a conversation, and with which.
        """
        try:
            return asyncio.run(self._chat(list(conversations), progress, options))
        except ExceptionGroup as faults:
            raise faults.exceptions[0] from None  # the others are those that it stopped

    async def _chat(self, conversations: list[Conversation], progress: bool, options: Mapping[str, Any]) -> list[str]:
        places = asyncio.Semaphore(AT_ONCE)
        with tqdm(total=len(conversations), unit="answer", disable=None if progress else True) as bar:
            async with asyncio.TaskGroup() as group:
                answers = [
                    group.create_task(self._answer(i, conversation, options, places, bar))
                    for i, conversation in enumerate(conversations)
                ]
        return [answer.result() for answer in answers]

    async def _answer(
        self, index: int, conversation: Conversation, options: Mapping[str, Any], places: asyncio.Semaphore, bar: tqdm
    ) -> str:
        async with places:
            job = self._engine.reserve()
            try:
                loop = asyncio.get_running_loop()
                job.submit(*await loop.run_in_executor(self._pool, self._prepare, index, conversation, options))
                text = "".join([delta.text async for delta in job.deltas()])
            finally:
                job.close()
        bar.update()
        return text

    def _prepare(self, index: int, conversation: Conversation, options: Mapping[str, Any]) -> tuple:
        try:
            return self._model.prepare(conversation, options)
        except ValueError as error:
            raise ValueError(f"conversation {index}: {error}") from error
