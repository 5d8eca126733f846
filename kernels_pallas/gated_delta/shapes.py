"""Workloads of this model, shared by tests, benchmark and tuning."""

from typing import NamedTuple

from kernels_pallas.tuning import TuningSpace

HEADS, WIDTH, CONV = 16, 128, 4  # key and value heads, key and value width, taps of the convolution
CHANNELS = 3 * HEADS * WIDTH


class ChunkedShape(NamedTuple):
    """Sequences of these lengths, one after the other in a row of tokens."""

    name: str
    lengths: tuple[int, ...]


class RecurrentShape(NamedTuple):
    """A batch of `rows` rows of `tokens` tokens, every row with a slot of its own."""

    name: str
    rows: int
    tokens: int


CHUNKED = (
    ChunkedShape("prompt of 256", (256,)),
    ChunkedShape("prompt of 2,048", (2048,)),
    ChunkedShape("1 x 8,192", (8192,)),
    ChunkedShape("8 x 1,024", (1024,) * 8),
    # A fixed random draw: 32 conversations of 1 to 2,000 tokens, 16,384 in all.
    ChunkedShape(
        "ragged 16,384",
        (1203, 64, 1, 977, 130, 511, 2000, 12, 640, 333, 1408, 65, 720, 191, 1024, 47)
        + (888, 256, 1500, 3, 402, 63, 610, 299, 1111, 128, 77, 540, 35, 702, 210, 234),
    ),
)

RECURRENT = (
    RecurrentShape("1 slot", 1, 1),
    RecurrentShape("8 slots", 8, 1),
    RecurrentShape("100 slots", 100, 1),
    RecurrentShape("8 slots, 4 drafts", 8, 4),
)

# A size is the number of heads of all sequences.
TUNING_SPACES = (
    TuningSpace(
        "hopper",
        "gated_delta_scan",
        ({"groups": 1, "stages": 2}, {"groups": 1, "stages": 3}, {"groups": 2, "stages": 2}),
        {127: ("gated delta, 1 x 8,192",), None: ("gated delta, 8 x 1,024", "gated delta, ragged 16,384")},
    ),
    TuningSpace(
        "hopper",
        "gated_delta_scan_backward",
        ({"groups": 1, "stages": 2}, {"groups": 2, "stages": 2}),
        {127: ("gated delta backward, 1 x 8,192",), None: ("gated delta backward, 8 x 1,024",)},
    ),
    TuningSpace(
        "hopper",
        "gated_delta_recurrent",
        (*({"groups": 1, "parts": parts, "stages": 1} for parts in (4, 8)), {"groups": 2, "parts": 2, "stages": 1})
        + tuple({"groups": groups, "parts": 1, "stages": stages} for groups in (2, 4) for stages in (1, 2, 3)),
        {
            33: ("gated delta step, 1 slot",),
            132: ("gated delta step, 8 slots",),
            None: ("gated delta step, 100 slots",),
        },
    ),
    TuningSpace("tpu", "gated_delta", ({"heads": 4}, {"heads": 8}, {"heads": 16}), {None: ("gated delta, 1 x 8,192",)}),
)
