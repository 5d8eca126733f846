"""Processes that draw scenes and make training batches of them, through the processing that serving uses.

Each worker has a pipe of its own and sends a batch as the bytes of its arrays, whose shapes are static, compressed twenty-fold
(most of it is plain ground); a thread a pipe puts them on the device. When training is faster than the drawing, it goes over
batches it has seen (`BatchLoader.take`).
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

MAX_TURNS = 9  # of a conversation: several questions cost one look at the pictures
THINKING_SHARE = 0.12  # of the conversations think before the last answer
FIRST_QUESTION_SHARE = (
    0.5  # of the conversations are sure to have the scene's first question, which asks for all there is to see or read
)
SINGLE_QUESTION_SHARE = 0.15  # of the conversations have one question, as most of a server's have
SEEDS_PER_RUN = 1_000_000_000  # of a run's scenes; the next run's come after them
DEFAULT_THOUGHT = "I look at the picture."  # a thought where a scene has none of its own


@dataclass(frozen=True)
class DataConfig:
    """What a worker is to draw.

    Attributes:
      folder: the model's small files.
      shape: of the batches.
      mix: which kinds of scenes, and how often.
      held_out: of the split for tests.
      first, step: it draws the scenes first, first + step, ...
      count: how many scenes; None for no end.
      ramp: scenes over which the easy kinds (`scenes.EASY`) give way to the mix; 0 for none.
      easy: the share of them that is left.
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
    """Makes conversations to learn from out of scenes."""

    def __init__(self, task: DataConfig):
        self.processor, self.mode = Processor.from_folder(task.folder), task.shape.downsample_mode
        self.markers = AnswerMarkers.from_processor(self.processor)

    def conversation(self, scene: scenes.Scene, turns: list[scenes.Turn], think: bool) -> Conversation:
        """A scene's pictures and some of its questions; the last answer may come after a thought."""
        spoken = scenes.messages(scene, turns)
        spoken[-1]["reasoning_content"] = (turns[-1].thought or DEFAULT_THOUGHT) if think else ""
        tools = [json.loads(tool) for tool in scene.tools] or None
        return conversation(self.processor, self.markers, spoken, where=scene.kind, tools=tools, downsample_mode=self.mode)


def training_conversations(task: DataConfig) -> Iterator[Conversation]:
    """The task's conversations, without end or as many as it counts: of each scene the turns that a dice picks."""
    builder, seed = ConversationBuilder(task), task.first
    while task.count is None or seed < task.first + task.step * task.count:
        rng = random.Random(f"turns {seed}")
        easy = max(task.easy, 1 - seed % SEEDS_PER_RUN / task.ramp) if task.ramp else task.easy
        scene = scenes.draw(seed, task.held_out, scenes.EASY if rng.random() < easy else task.mix)
        wanted = 1 if rng.random() < SINGLE_QUESTION_SHARE else rng.randint(2, MAX_TURNS)
        turns = rng.sample(scene.turns, min(wanted, len(scene.turns)))
        if rng.random() < FIRST_QUESTION_SHARE and scene.turns[0] not in turns:
            turns = [scene.turns[0], *turns]
        turns.sort(key=lambda turn: turn.call is not None)  # a call ends the conversation: its result is not known
        think = bool(scene.media) and turns[-1].call is None and rng.random() < THINKING_SHARE
        example = builder.conversation(scene, turns, think)
        while task.shape.unsupported_reason(example) and len(turns) > 1:  # a large picture leaves less room for questions
            turns = turns[len(turns) // 2 :]
            example = builder.conversation(scene, turns, think)
        if task.shape.unsupported_reason(example) is None:
            yield example
        seed += task.step


def eval_conversations(task: DataConfig) -> Iterator[tuple[str, Conversation]]:
    """Every question alone of each of the task's scenes, with its group; thinking is a group of its own."""
    builder = ConversationBuilder(task)
    for seed in range(task.first, task.first + (task.count or 0)):
        scene = scenes.draw(seed, held_out=True, mix=task.mix)
        turn, think = scenes.exam_turn(seed, scene)
        question = builder.conversation(scene, [turn], think)
        if task.shape.unsupported_reason(question) is None:
            yield ("thinking" if think else turn.group), question


def batches(task: DataConfig) -> Iterator[TrainBatch]:
    """The task's batches, on the host."""
    vision = ModelConfig.from_folder(task.folder).vision
    for rows in fill(training_conversations(task), task.shape):
        yield stack([pack(rows, task.shape, vision)])


def _work(task: DataConfig, pipe: Connection) -> None:
    for batch in batches(task):
        try:
            pipe.send_bytes(zlib.compress(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(batch)), 1))
        except (BrokenPipeError, ConnectionResetError):
            return  # nobody reads any more


class BatchLoader:
    """Batches on the device, drawn by one process for each task. Use it as a context manager.

    Args:
      tasks: what to draw.
      config: the model's.
      kept: how many batches stay on the device, to be gone over again when no new one is ready.
    """

    def __init__(self, tasks: list[DataConfig], config: ModelConfig, kept: int):
        self.ready: queue.Queue[TrainBatch] = queue.Queue(maxsize=8)
        self.seen: list[TrainBatch] = []
        self.kept, self.fresh, self.repeated = kept, 0, 0
        self.closed = False
        spawn, self.rng = multiprocessing.get_context("spawn"), random.Random(0)
        self.processes, self.threads = [], []
        for task in tasks:
            receiver, sender = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_work, args=(task, sender), daemon=True)
            process.start()
            sender.close()
            template = stack([pack([], task.shape, config.vision)])
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
                return  # the worker has ended
            parts = np.split(buffer, ends[:-1])
            arrays = [part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
            self.ready.put(jax.device_put(jax.tree.unflatten(tree, arrays)))

    def take(self) -> TrainBatch:
        """A new batch, or one seen before if there is none; waits for the first."""
        try:
            batch = self.ready.get(block=not self.seen)
        except queue.Empty:
            self.repeated += 1
            return self.rng.choice(self.seen)
        self.fresh += 1
        if len(self.seen) < self.kept:
            self.seen.append(batch)
        else:
            self.seen[self.rng.randrange(self.kept)] = batch
        return batch

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_) -> None:
        self.closed = True
        for process in self.processes:
            process.terminate()
        while any(thread.is_alive() for thread in self.threads):
            with contextlib.suppress(queue.Empty):
                self.ready.get(timeout=0.1)  # one may be waiting for room
