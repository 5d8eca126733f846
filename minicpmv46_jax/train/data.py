"""Data pipeline through grain: files of conversations in, packed batches out.

Rows are shuffled by a seed and divided among hosts. Grain's threads or processes parse a row, open its
pictures and tokenise it. Packing is the last stage. The iterator's state marks the start of the next batch,
so a resumed run sees the batches that it would have seen without the interruption. Conversations keep the
order of the shuffle: a conversation that does not fit a batch starts the next one.
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
    """Random-access source for grain: the lines of several files by index, without blank lines."""

    def __init__(self, files: Sequence[str | Path]):
        """Indexes the files.

        Raises:
          ValueError: a file does not exist, or all are empty.
        """
        self.files = [Path(file) for file in files]
        self.offsets: list[tuple[int, int, int]] = []  # index of the file, line number from 1, byte offset
        for number, file in enumerate(self.files):
            if not file.is_file():
                raise ValueError(f"{file} does not exist")
            offset = 0
            with file.open("rb") as lines:
                for line_number, line in enumerate(lines, start=1):
                    if line.strip():
                        self.offsets.append((number, line_number, offset))
                    offset += len(line)
        if not self.offsets:
            raise ValueError(f"there is no line in {', '.join(map(str, self.files)) or 'no files'}")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> tuple[str, bytes]:
        """Returns ("file:line", the line's bytes)."""
        number, line, offset = self.offsets[index]
        with self.files[number].open("rb") as file:
            file.seek(offset)
            return f"{self.files[number]}:{line}", file.readline()


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on; `message` names the row and the reason."""

    message: str


@dataclasses.dataclass(frozen=True)
class RowProcessor:
    """Turns a line of a file into a conversation that fits a batch, or into a `BadRow`; runs in grain's
    workers.

    Attributes:
      processor, markers: those of the checkpoint.
      shape: the batch's sizes.
      root: the folder that relative paths of media start from; None for each file's own folder.
      last_only: True to train on the last answer of each conversation only.
      options: options of `processing.Processor`.
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
            return self.parse(where, text)
        except ValueError as error:
            return BadRow(str(error) if str(error).startswith(where) else f"{where}: {error}")

    def parse(self, where: str, text: bytes) -> Conversation:
        """Returns the line's conversation.

        Raises:
          ValueError: the line is malformed, its media cannot be read, or it fits no batch; the message gives
            the reason.
        """
        root = self.root or Path(where.rpartition(":")[0]).parent
        row = read_row(text.decode("utf-8"), root)
        options = {**self.options, "downsample_mode": self.shape.downsample_mode}
        parsed = conversation(
            self.processor, self.markers, row.messages, where=where, last_only=self.last_only, tools=row.tools, **options
        )
        if reason := self.shape.unsupported_reason(parsed):
            raise ValueError(reason)
        return parsed


class Batches(grain.IterDataset):
    """Dataset of step inputs: `accumulation` x `devices` packed batches each."""

    def __init__(self, parent: grain.IterDataset, shape: BatchShape, vision: VisionConfig, parts: tuple[int, int], errors: str):
        super().__init__(parent)
        if errors not in ERRORS:
            raise ValueError(f"errors is {errors!r}, expected one of {', '.join(ERRORS)}")
        self.shape, self.vision, self.parts, self.errors = shape, vision, parts, errors

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self._parent.__iter__(), self)


class BatchIterator(grain.DatasetIterator):
    """Iterator of `Batches`.

    Attributes:
      bad_rows: the skipped rows by place; the log gives each row's reason.
      conversations: number of conversations packed so far.
    """

    def __init__(self, parent: grain.DatasetIterator, batches: Batches):
        super().__init__(parent)
        self.batches = batches
        self.waiting: Conversation | None = None  # did not fit the last batch; starts the next one
        self.state = parent.get_state()  # of the parent, before the next batch's first conversation
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
        """Returns the rows of one packed batch; rows are empty at the end of the data."""
        filler = BatchFiller(self.batches.shape)
        while (conversation := self._next_conversation()) is not None:
            if not filler.add(conversation):
                self.waiting = conversation
                break
            self.conversations += 1
            self.state = self._parent.get_state()
        return filler.rows

    def _next_conversation(self) -> Conversation | None:
        """Returns the next conversation, or None at the end of the data."""
        if self.waiting is not None:
            conversation, self.waiting = self.waiting, None
            return conversation
        for row in self._parent:
            if not isinstance(row, BadRow):
                return row
            if self.batches.errors == "fatal":
                raise ValueError(row.message)
            self.bad_rows[row.message.split(": ")[0]] += 1
            log.warning("skipped %s", row.message)
        return None

    def get_state(self) -> dict[str, Any]:
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)
        self.state, self.waiting = state, None


def batches(
    files: Sequence[str | Path],
    row_processor: RowProcessor,
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
    """Returns the dataset of the files' conversations as packed batches.

    Args:
      files: JSONL files; see `chat_formats`.
      row_processor: turns a line into a conversation.
      vision: the vision tower's sizes.
      accumulation, devices: leading axes of a batch.
      epochs: number of passes over the data; None for no end.
      seed: seed of the shuffle, whose order differs in every epoch; None for the files' order.
      errors: "fatal" raises at a bad row, "skip" leaves it out and logs it.
      workers: processes that parse rows; 0 for threads only.
      threads: threads that parse rows in each process.
      shard: (host, hosts): this host reads every `hosts`-th row, beginning with row `host`.

    Raises:
      ValueError: a file does not exist. While iterating with errors = "fatal": a row is bad; the message
        names file and line.
    """
    rows = grain.MapDataset.source(LineSource(files))[shard[0] :: shard[1]]
    if seed is not None:
        rows = rows.seed(seed).shuffle()
    rows = rows.repeat(epochs).map(row_processor)
    read = rows.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(4 * threads, 1)))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's processes read absl flags, which this program does not parse
        read = read.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return Batches(read, row_processor.shape, vision, (accumulation, devices), errors)
