"""Sizes of slots, pages, snapshots and the encoder cache that fit into memory, and the compiled shapes."""

import dataclasses

from kernels_pallas.page_size import PAGE
from minicpmv46_jax.config import TextConfig, VisionConfig
from minicpmv46_jax.generation.options import MAX_BIASED
from minicpmv46_jax.model.state import page_bytes, slot_bytes
from serve.engine.page_pool import num_pages

GIB = 2**30
ENCODER_CACHE_SHARE, SNAPSHOT_SHARE, SLOT_SHARE = 1 / 16, 1 / 4, 1 / 2  # of memory; the pages get the rest
MAX_ENCODER_CACHE_ROWS = 65536  # 134 MB in bfloat16: 148 pictures of 1280 x 720
LONGEST_VIEW = 1152  # patches; a view of about 448 x 448 pixels with an aspect ratio of at most 5


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """User settings of the engine; None takes the largest value that fits.

    Attributes:
      max_running: requests decoded at once.
      max_model_len: tokens of a prompt and its output.
      prefix_cache: True keeps the state of prompt prefixes for later requests.
    """

    max_running: int | None = None
    max_model_len: int | None = None
    prefix_cache: bool = True


@dataclasses.dataclass(frozen=True)
class EncoderShape:
    """A compiled shape of the vision tower: patches in all, views, and patches of the longest view."""

    patches: int
    views: int
    longest_view: int


@dataclasses.dataclass(frozen=True)
class ShapeBuckets:
    """Shapes that are compiled; each call is padded to the smallest one that holds it.

    Attributes:
      decode_rows: rows of a decode step; `max_running` is added as the largest.
      decode_steps: tokens per row in one dispatch while no prompt is prefilled.
      prefill_shapes: (tokens, prompts) of a prefill step, ascending; the last is a step's token budget.
      encoder_shapes: shapes of the vision tower, ascending.
    """

    decode_rows: tuple[int, ...]
    decode_steps: int
    prefill_shapes: tuple[tuple[int, int], ...]
    encoder_shapes: tuple[EncoderShape, ...]


# A prefill step delays the next token of every stream: on an H200 in plain XLA 2,048 tokens took 40 ms and
# 8,192 patches 20 ms. The last encoder shape serves extreme aspect ratios: a picture of 14,000 x 14 pixels is
# one view of 4,000 patches.
ACCELERATOR = ShapeBuckets(
    decode_rows=(1, 8, 32),
    decode_steps=8,
    prefill_shapes=((128, 2), (512, 4), (1024, 8), (2048, 16)),
    encoder_shapes=(EncoderShape(2048, 4, LONGEST_VIEW), EncoderShape(8192, 16, LONGEST_VIEW), EncoderShape(4928, 1, 4928)),
)
# Two decode rows at least: XLA on a CPU turns a scatter of one row into an update that copies the whole
# operand. One row took 28 ms a step of the demo model, two rows took 0.8 ms.
CPU = ShapeBuckets(
    decode_rows=(2,),
    decode_steps=1,
    prefill_shapes=((64, 1), (512, 4)),
    encoder_shapes=(
        EncoderShape(LONGEST_VIEW, 1, LONGEST_VIEW),
        EncoderShape(4608, 8, LONGEST_VIEW),
        EncoderShape(4928, 1, 4928),
    ),
)
MAX_RUNNING, MAX_RUNNING_CPU = 128, 16


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Sizes of the engine's device state.

    Attributes:
      max_running: slots of running requests.
      num_snapshots: slots of recurrent and conv state beyond those, for the prefix cache.
      num_pages: pages of keys and values.
      max_model_len: tokens that a prompt and its output may have.
      encoder_cache_rows: rows of the encoder cache, one per image token.
      buckets: the compiled shapes.
    """

    max_running: int
    num_snapshots: int
    num_pages: int
    max_model_len: int
    encoder_cache_rows: int
    buckets: ShapeBuckets

    @property
    def decode_rows(self) -> tuple[int, ...]:
        """Row counts of the decode programs, ascending."""
        return (*(rows for rows in self.buckets.decode_rows if rows < self.max_running), self.max_running)


def sampling_bytes(text: TextConfig) -> int:
    """Returns the bytes that sampling needs per request: token history, held logits and logit biases."""
    return (1 + 4 + 4) * text.vocab_size + (4 + 4) * MAX_BIASED


def working_bytes(vision: VisionConfig, buckets: ShapeBuckets) -> int:
    """Returns the bytes of temporaries: the tower's attention scores and their exponentials (float32), and 1
    GiB for the rest.
    """
    return GIB + max(2 * 4 * p.views * vision.num_attention_heads * p.longest_view**2 for p in buckets.encoder_shapes)


def plan_memory(
    text: TextConfig, itemsize: int, memory: int, config: EngineConfig, buckets: ShapeBuckets, default_max_running: int
) -> tuple[MemoryPlan, list[str]]:
    """Divides memory among slots, pages, snapshots and the encoder cache.

    Args:
      text: the text backbone.
      itemsize: bytes per number of keys, values and encoder cache.
      memory: bytes for all state.
      config: the user's settings.
      buckets: shapes to compile.
      default_max_running: `max_running` where the configuration leaves it open.

    Returns:
      The plan, and one line of text for each setting that was reduced.

    Raises:
      ValueError: the memory does not hold one short conversation.
    """
    lines: list[str] = []
    page, slot, row = page_bytes(text, itemsize), slot_bytes(text, itemsize), text.hidden_size * itemsize
    conversation = slot + sampling_bytes(text)
    rows = min(MAX_ENCODER_CACHE_ROWS, int(memory * ENCODER_CACHE_SHARE) // row)
    running = _max_running(config.max_running, default_max_running, int(memory * SLOT_SHARE) // conversation, lines)
    length = _max_model_len(config.max_model_len, text.max_position_embeddings, lines)
    useful = 2 * running * num_pages(length)  # every running request at full length, and as much again for prefixes
    room = memory - rows * row - running * conversation
    snapshots = min(int(memory * SNAPSHOT_SHARE), max(room - num_pages(length) * page, 0)) // slot if config.prefix_cache else 0
    snapshots = min(snapshots, useful)
    pages = min((room - snapshots * slot) // page, useful)
    if running < 1 or pages < 2 or rows < buckets.encoder_shapes[-1].longest_view // 4:
        raise ValueError(f"{memory / GIB:.2f} GiB are left for the state of conversations, too little for one")
    if pages * PAGE < length:
        lines.append(f"{length} tokens need {num_pages(length)} pages, and {pages} fit: serving {pages * PAGE} tokens at most")
        length = pages * PAGE
    return MemoryPlan(running, snapshots, pages, length, rows, buckets), lines


def _max_running(wanted: int | None, default: int, fitting: int, lines: list[str]) -> int:
    if wanted is not None and wanted > fitting:
        lines.append(f"--max-running is {wanted}, and {fitting} fit into the memory: running {fitting}")
    return min(default if wanted is None else wanted, fitting)


def _max_model_len(wanted: int | None, context: int, lines: list[str]) -> int:
    if wanted is not None and wanted > context:
        lines.append(f"--max-model-len is {wanted}, and the model's context has {context} tokens: serving {context}")
    return context if wanted is None else min(wanted, context)
