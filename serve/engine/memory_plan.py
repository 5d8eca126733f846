"""How much of everything fits: slots, pages, snapshots, features; and the shapes that are compiled. No jax: these are numbers."""

import dataclasses

from minicpmv46_jax.config import TextConfig, VisionConfig
from minicpmv46_jax.generation.options import MAX_BIASED
from serve.engine.page_pool import PAGE, pages_of

GIB = 2**30
FEATURE_SHARE, SNAPSHOT_SHARE, SLOT_SHARE = 1 / 16, 1 / 4, 1 / 2  # of the memory; what these leave free goes to pages
MOST_FEATURES = 65536  # rows; 134 MB in bfloat16: 148 pictures of 1280 x 720
LONGEST_VIEW = 1152  # patches; a view of about 448 x 448 pixels whose sides are at most as 5 to 1


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What the user asks for; None leaves it to what fits.

    Attributes:
      max_running: answers decoded at once.
      max_model_len: tokens of a prompt and its answer.
      prefix_cache: whether beginnings of prompts are kept.
    """

    max_running: int | None = None
    max_model_len: int | None = None
    prefix_cache: bool = True


@dataclasses.dataclass(frozen=True)
class EncoderShape:
    """A shape of the tower: patches in the row, views, patches of the longest view."""

    patches: int
    views: int
    longest: int


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes that are compiled.

    Attributes:
      rows: rows of a decoding step; the largest is added to it, max_running.
      steps: tokens a row gets in one dispatch where nobody is read.
      prompts: (tokens, prompts) of a reading step, ascending; the last is the budget of a step.
      passes: of the tower, ascending.
    """

    rows: tuple[int, ...]
    steps: int
    prompts: tuple[tuple[int, int], ...]
    passes: tuple[EncoderShape, ...]


# A reading step is what a stream has to wait between two tokens: on an H200 2,048 tokens took 40 ms in plain XLA, a pass of 8,192
# patches 20 ms. The last pass is for views of extreme shapes: 14,000 x 14 pixels are 4,000 patches in one view.
ACCELERATOR = Buckets(
    rows=(1, 8, 32),
    steps=8,
    prompts=((128, 2), (512, 4), (1024, 8), (2048, 16)),
    passes=(EncoderShape(2048, 4, LONGEST_VIEW), EncoderShape(8192, 16, LONGEST_VIEW), EncoderShape(4928, 1, 4928)),
)
# On a CPU XLA makes of a scatter of one row an update that copies all that it updates: with one row a step of the small model
# took 28 ms, with two 0.8.
CPU = Buckets(
    rows=(2,),
    steps=1,
    prompts=((64, 1), (512, 4)),
    passes=(EncoderShape(LONGEST_VIEW, 1, LONGEST_VIEW), EncoderShape(4608, 8, LONGEST_VIEW), EncoderShape(4928, 1, 4928)),
)
MAX_RUNNING, MAX_RUNNING_CPU = 128, 16


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What the engine has.

    Attributes:
      running: slots of answers. snapshots: slots of memory beyond those. pages: of keys and values.
      longest: tokens that a prompt and its answer may have. features: rows of the bank. buckets: the shapes compiled.
    """

    running: int
    snapshots: int
    pages: int
    longest: int
    features: int
    buckets: Buckets

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of a decoding step."""
        return (*(rows for rows in self.buckets.rows if rows < self.running), self.running)


def page_bytes(text: TextConfig, itemsize: int) -> int:
    """Keys and values of 64 tokens."""
    return text.layer_types.count("full_attention") * 2 * PAGE * text.num_key_value_heads * text.head_dim * itemsize


def slot_bytes(text: TextConfig, itemsize: int) -> int:
    """The memory of one sequence; the gated-delta part is float32 always."""
    memory = text.linear_num_value_heads * text.linear_value_head_dim * text.linear_key_head_dim * 4
    tail = (text.linear_conv_kernel_dim - 1) * text.linear_conv_dim * itemsize
    return text.layer_types.count("linear_attention") * (memory + tail)


def sampling_bytes(text: TextConfig) -> int:
    """What is kept of one sequence for sampling: which tokens it has used and how often, scores, biases."""
    return (1 + 4 + 4) * text.vocab_size + (4 + 4) * MAX_BIASED


def working_bytes(vision: VisionConfig, buckets: Buckets) -> int:
    """What a step needs beside the state: the tower's scores and their exponentials, float32, and a GiB for all the rest."""
    return GIB + max(2 * 4 * p.views * vision.num_attention_heads * p.longest**2 for p in buckets.passes)


def plan_memory(
    text: TextConfig, itemsize: int, memory: int, wishes: EngineConfig, buckets: Buckets, default: int
) -> tuple[MemoryPlan, list[str]]:
    """Shares out `memory` bytes.

    Args:
      text: the text backbone.
      itemsize: bytes of a number in keys, values and features.
      memory: bytes for all state.
      wishes: the user's.
      buckets: shapes to compile.
      default: max_running where the user leaves it open.

    Returns:
      The sizes, and a line for each wish that had to be cut.

    Raises:
      ValueError: not even one short conversation fits.
    """
    lines: list[str] = []
    page, slot, row = page_bytes(text, itemsize), slot_bytes(text, itemsize), text.hidden_size * itemsize
    conversation = slot + sampling_bytes(text)
    features = min(MOST_FEATURES, int(memory * FEATURE_SHARE) // row)
    running = _running(wishes.max_running, default, int(memory * SLOT_SHARE) // conversation, lines)
    longest = _longest(wishes.max_model_len, text.max_position_embeddings, lines)
    useful = 2 * running * pages_of(longest)  # all answers at their longest, and as much again for prefixes
    room = memory - features * row - running * conversation
    snapshots = min(int(memory * SNAPSHOT_SHARE), max(room - pages_of(longest) * page, 0)) // slot if wishes.prefix_cache else 0
    snapshots = min(snapshots, useful)
    pages = min((room - snapshots * slot) // page, useful)
    if running < 1 or pages < 2 or features < buckets.passes[-1].longest // 4:
        raise ValueError(f"{memory / GIB:.2f} GiB are left for the state of conversations, which is too little for one")
    if pages * PAGE < longest:
        lines.append(f"{longest} tokens need {pages_of(longest)} pages, and {pages} fit: serving {pages * PAGE} tokens at most")
        longest = pages * PAGE
    return MemoryPlan(running, snapshots, pages, longest, features, buckets), lines


def _running(wished: int | None, default: int, fits: int, lines: list[str]) -> int:
    if wished is not None and wished > fits:
        lines.append(f"--max-running is {wished}, and {fits} fit into the memory: running {fits}")
    return min(default if wished is None else wished, fits)


def _longest(wished: int | None, context: int, lines: list[str]) -> int:
    if wished is not None and wished > context:
        lines.append(f"--max-model-len is {wished}, and the model's context has {context} tokens: serving {context}")
    return context if wished is None else min(wished, context)
