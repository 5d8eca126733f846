"""Worker processes that draw scenes and make training batches of them, with the same processing as serving.

Each worker has its own pipe. It sends a batch as the compressed bytes of its arrays, whose shapes are
static; most pixels are plain background, so the bytes compress well. One thread per pipe puts the batches on
the device. When training is faster than drawing, earlier batches are replayed (`BatchLoader.next_batch`).
"""

import contextlib
import json
import multiprocessing
import queue
import random
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import numpy as np

from minicpmv46_jax import scenes
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.processing import Processor
from minicpmv46_jax.train import AnswerMarkers, BatchShape, Conversation, TrainBatch, conversation, fill, pack, stack

MAX_TURNS = 9  # of a conversation; its questions share the encoding of its images
THINKING_SHARE = 0.12  # of conversations have a thought before the last answer
# Share of conversations that contain the scene's first question, which asks for everything in the image.
# Others contain it by chance.
FIRST_QUESTION_SHARE = 0.5
SINGLE_QUESTION_SHARE = 0.15  # of conversations have one question, like most requests of a server
SEEDS_PER_RUN = 1_000_000_000  # scene seeds of one run; the next run's seeds follow
DEFAULT_THOUGHT = "I look at the picture."  # thought of a turn that has none


@dataclass(frozen=True)
class DataConfig:
    """The data that one worker makes.

    Attributes:
      folder: the folder with the model's side files.
      shape: the batches' shape.
      mix: weight of each kind of scene.
      held_out: draw scenes of the evaluation split.
      first, step: the scene seeds are first, first + step, ...
      count: number of scenes; None for an endless stream.
      ramp: number of scenes over which the mix replaces the easy kinds (`scenes.EASY`); 0 for no ramp.
      easy: share of easy scenes after the ramp.
    """

    folder: Path
    shape: BatchShape
    mix: dict[str, float]
    held_out: bool = False
    first: int = 0
    step: int = 1
    count: int | None = None
    ramp: int = 0
    easy: float = 0.0


class ConversationBuilder:
    """Builds training conversations from scenes."""

    def __init__(self, data_config: DataConfig):
        self.processor, self.mode = Processor.from_folder(data_config.folder), data_config.shape.downsample_mode
        self.markers = AnswerMarkers.from_processor(self.processor)

    def conversation(self, scene: scenes.Scene, turns: list[scenes.Turn], think: bool) -> Conversation:
        """Returns a conversation about a scene; with `think`, a thought precedes the last answer."""
        spoken = scenes.messages(scene, turns)
        spoken[-1]["reasoning_content"] = (turns[-1].thought or DEFAULT_THOUGHT) if think else ""
        tools = [json.loads(tool) for tool in scene.tools] or None
        return conversation(self.processor, self.markers, spoken, where=scene.kind, tools=tools, downsample_mode=self.mode)


def training_conversations(data_config: DataConfig) -> Iterator[Conversation]:
    """Yields one training conversation per scene, with randomly picked turns; endless if `count` is None."""
    builder, seed = ConversationBuilder(data_config), data_config.first
    while data_config.count is None or seed < data_config.first + data_config.step * data_config.count:
        rng = random.Random(f"turns {seed}")
        easy = max(data_config.easy, 1 - seed % SEEDS_PER_RUN / data_config.ramp) if data_config.ramp else data_config.easy
        scene = scenes.draw(seed, data_config.held_out, scenes.EASY if rng.random() < easy else data_config.mix)
        wanted = 1 if rng.random() < SINGLE_QUESTION_SHARE else rng.randint(2, MAX_TURNS)
        turns = rng.sample(scene.turns, min(wanted, len(scene.turns)))
        if rng.random() < FIRST_QUESTION_SHARE and scene.turns[0] not in turns:
            turns = [scene.turns[0], *turns]
        turns.sort(key=lambda turn: turn.call is not None)  # a tool call comes last, because its result is unknown
        think = bool(scene.media) and turns[-1].call is None and rng.random() < THINKING_SHARE
        example = builder.conversation(scene, turns, think)
        while data_config.shape.unsupported_reason(example) and len(turns) > 1:  # a large image leaves room for fewer questions
            turns = turns[len(turns) // 2 :]
            example = builder.conversation(scene, turns, think)
        if data_config.shape.unsupported_reason(example) is None:
            yield example
        seed += data_config.step


def eval_conversations(data_config: DataConfig) -> Iterator[tuple[str, Conversation]]:
    """Yields (group, conversation) with one held-out question per scene; "thinking" is its own group."""
    builder = ConversationBuilder(data_config)
    for seed in range(data_config.first, data_config.first + (data_config.count or 0)):
        scene = scenes.draw(seed, held_out=True, mix=data_config.mix)
        turn, think = scenes.exam_turn(seed, scene)
        question = builder.conversation(scene, [turn], think)
        if data_config.shape.unsupported_reason(question) is None:
            yield ("thinking" if think else turn.group), question


def training_batches(data_config: DataConfig) -> Iterator[TrainBatch]:
    """Yields training batches in host memory."""
    vision = ModelConfig.from_folder(data_config.folder).vision
    for rows in fill(training_conversations(data_config), data_config.shape):
        yield stack([pack(rows, data_config.shape, vision)])


def _work(data_config: DataConfig, pipe: Connection) -> None:
    for batch in training_batches(data_config):
        try:
            pipe.send_bytes(zlib.compress(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(batch)), 1))
        except (BrokenPipeError, ConnectionResetError):
            return  # the loader has closed its end


class BatchLoader:
    """Loader of batches on the device; one process draws for each data config. A context manager.

    Args:
      data_configs: the data of each worker.
      config: the model's configuration.
      max_replay: number of batches kept on the device for replay.
    """

    def __init__(self, data_configs: list[DataConfig], config: ModelConfig, max_replay: int):
        self.ready: queue.Queue[TrainBatch] = queue.Queue(maxsize=8)
        self.replay: list[TrainBatch] = []
        self.max_replay, self.fresh, self.repeated = max_replay, 0, 0
        self.closed = False
        spawn, self.rng = multiprocessing.get_context("spawn"), random.Random(0)
        self.processes, self.threads = [], []
        for data_config in data_configs:
            receiver, sender = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_work, args=(data_config, sender), daemon=True)
            process.start()
            sender.close()
            template = stack([pack([], data_config.shape, config.vision)])
            thread = threading.Thread(target=self._receive, args=(receiver, template), daemon=True)
            thread.start()
            self.processes.append(process)
            self.threads.append(thread)

    def _receive(self, pipe: Connection, template: TrainBatch) -> None:
        leaves, tree = jax.tree.flatten(template)
        ends = np.cumsum([leaf.nbytes for leaf in leaves])
        while not self.closed:
            try:
                buffer = np.frombuffer(zlib.decompress(pipe.recv_bytes()), np.uint8)
            except (EOFError, OSError):
                return  # the worker has exited
            parts = np.split(buffer, ends[:-1])
            arrays = [part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
            self.ready.put(jax.device_put(jax.tree.unflatten(tree, arrays)))

    def next_batch(self) -> TrainBatch:
        """Returns a new batch, or a random earlier one if none is ready. Waits for the first batch."""
        try:
            batch = self.ready.get(block=not self.replay)
        except queue.Empty:
            self.repeated += 1
            return self.rng.choice(self.replay)
        self.fresh += 1
        if len(self.replay) < self.max_replay:
            self.replay.append(batch)
        else:
            self.replay[self.rng.randrange(self.max_replay)] = batch
        return batch

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_) -> None:
        self.closed = True
        for process in self.processes:
            process.terminate()
        while any(thread.is_alive() for thread in self.threads):
            with contextlib.suppress(queue.Empty):
                self.ready.get(timeout=0.1)  # a receiving thread may be blocked on the full queue
