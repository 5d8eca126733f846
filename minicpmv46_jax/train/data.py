"""Files of conversations -> packed batches, through grain: shuffled by a seed, sharded, and resumed at the next batch.

A row is read, its pictures opened and its tokens made by grain's threads or processes; packing is the last stage. The iterator's
state is where the next batch begins, so a run that goes on sees the batches that it would have seen. Conversations stay in the
order of the shuffle: what does not fit a batch begins the next.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
from absl import flags

from minicpmv46_jax.config import VisionConfig
from minicpmv46_jax.processing import Processor
from minicpmv46_jax.train.batch import BatchFiller, BatchShape, Conversation, TrainBatch, pack, stack
from minicpmv46_jax.train.chat_formats import read_row
from minicpmv46_jax.train.loss_mask import AnswerMarkers, conversation

log = logging.getLogger(__name__)
ERRORS = ("fatal", "skip")


class LineSource:
    """The lines of several files, by number: a random-access source for grain. Blank lines are left out."""

    def __init__(self, files: Sequence[str | Path]):
        """Raises ValueError where a file does not exist or there is no line at all."""
        self.files = [Path(file) for file in files]
        self.places: list[tuple[int, int, int]] = []  # file, line from 1, byte offset
        for number, file in enumerate(self.files):
            if not file.is_file():
                raise ValueError(f"{file} does not exist")
            offset = 0
            with file.open("rb") as lines:
                for line_number, line in enumerate(lines, start=1):
                    if line.strip():
                        self.places.append((number, line_number, offset))
                    offset += len(line)
        if not self.places:
            raise ValueError(f"there is no line in {', '.join(map(str, self.files)) or 'no files'}")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[str, bytes]:
        """("file:line", the line's bytes)."""
        number, line, offset = self.places[index]
        with self.files[number].open("rb") as file:
            file.seek(offset)
            return f"{self.files[number]}:{line}", file.readline()


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be learned from, and why."""

    message: str


@dataclasses.dataclass(frozen=True)
class RowProcessor:
    """A line -> a conversation that fits the batch, or a fault: what grain's workers do.

    Attributes:
      processor, markers: the checkpoint's.
      shape: of a batch.
      root: what relative paths of media are relative to; None for each file's own folder.
      last_only: learn the last answer alone.
      options: as `processing.Processor` takes them.
    """

    processor: Processor
    markers: AnswerMarkers
    shape: BatchShape
    root: Path | None = None
    last_only: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, line: tuple[str, bytes]) -> Conversation | BadRow:
        where, text = line
        try:
            return self.read(where, text)
        except ValueError as error:
            return BadRow(str(error) if str(error).startswith(where) else f"{where}: {error}")

    def read(self, where: str, text: bytes) -> Conversation:
        """Raises ValueError saying what is wrong with the line."""
        root = self.root or Path(where.rpartition(":")[0]).parent
        row = read_row(text.decode("utf-8"), root)
        options = {**self.options, "downsample_mode": self.shape.downsample_mode}
        one = conversation(
            self.processor, self.markers, row.messages, where=where, last_only=self.last_only, tools=row.tools, **options
        )
        if unsupported_reason := self.shape.unsupported_reason(one):
            raise ValueError(unsupported_reason)
        return one


class Batches(grain.IterDataset):
    """Batches of `devices` x `accumulation` packed parts, out of a dataset of conversations and faults."""

    def __init__(self, parent: grain.IterDataset, shape: BatchShape, vision: VisionConfig, parts: tuple[int, int], errors: str):
        super().__init__(parent)
        if errors not in ERRORS:
            raise ValueError(f"errors is {errors!r}, expected one of {', '.join(ERRORS)}")
        self.shape, self.vision, self.parts, self.errors = shape, vision, parts, errors

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self._parent.__iter__(), self)


class BatchIterator(grain.DatasetIterator):
    """`bad_rows` counts the rows that were skipped; each is named in the log."""

    def __init__(self, parent: grain.DatasetIterator, batches: Batches):
        super().__init__(parent)
        self.batches = batches
        self.waiting: Conversation | None = None  # read already, for the next batch
        self.state = parent.get_state()  # before the next batch's first conversation
        self.bad_rows: Counter[str] = Counter()
        self.conversations = 0

    def __next__(self) -> TrainBatch:
        accumulation, devices = self.batches.parts
        parts = [self._part() for _ in range(accumulation * devices)]
        if not any(map(any, parts)):
            raise StopIteration
        packed = [pack(rows, self.batches.shape, self.batches.vision) for rows in parts]
        return stack(packed, devices)

    def _part(self) -> list[list[Conversation]]:
        """The rows of one part; the last ones of the data may be empty."""
        filler = BatchFiller(self.batches.shape)
        while (one := self._conversation()) is not None:
            if not filler.add(one):
                self.waiting = one
                break
            self.conversations += 1
            self.state = self._parent.get_state()
        return filler.rows

    def _conversation(self) -> Conversation | None:
        """The next one, or None at the end."""
        if self.waiting is not None:
            one, self.waiting = self.waiting, None
            return one
        for found in self._parent:
            if not isinstance(found, BadRow):
                return found
            if self.batches.errors == "fatal":
                raise ValueError(found.message)
            self.bad_rows[found.message.split(": ")[0]] += 1
            log.warning("skipped %s", found.message)
        return None

    def get_state(self) -> dict[str, Any]:
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)
        self.state, self.waiting = state, None


def batches(
    files: Sequence[str | Path],
    reader: RowProcessor,
    vision: VisionConfig,
    *,
    accumulation: int = 1,
    devices: int = 1,
    epochs: int | None = None,
    seed: int | None = 0,
    errors: str = "fatal",
    workers: int = 0,
    threads: int = 4,
    shard: tuple[int, int] = (0, 1),
) -> Batches:
    """Batches of the files' conversations.

    Args:
      files: JSONL; see `rows`.
      reader: line -> conversation.
      vision: the tower's sizes.
      accumulation, devices: leading axes of a batch.
      epochs: how often the data is read; None without end.
      seed: of the shuffle, which is another one in every epoch; None for the files' order.
      errors: what becomes of rows that cannot be learned from: "fatal" or "skip".
      workers: processes that read rows; 0 for threads alone.
      threads: that read rows, in each process.
      shard: (which, of how many): every n-th row, for data that several hosts read.

    Raises:
      ValueError: naming the file that does not exist; while iterating, with errors = "fatal", the file and line at fault.
    """
    rows = grain.MapDataset.source(LineSource(files))[shard[0] :: shard[1]]
    if seed is not None:
        rows = rows.seed(seed).shuffle()
    rows = rows.repeat(epochs).map(reader)
    read = rows.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(4 * threads, 1)))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's processes ask for its absl flags, which this program does not parse
        read = read.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return Batches(read, reader.shape, vision, (accumulation, devices), errors)
