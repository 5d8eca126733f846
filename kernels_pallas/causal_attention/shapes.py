"""The real workloads of training, one table for tests and benchmarks."""

from typing import NamedTuple

HEADS, KEY_HEADS, WIDTH = 8, 2, 256


class CausalShape(NamedTuple):
    """Rows of a batch, all with sequences of the same lengths."""

    name: str
    rows: int
    lengths: tuple[int, ...]


CAUSAL = (
    CausalShape("8 x 4,096", 8, (4096,)),
    CausalShape("8 x 4,096, conversations of 31 to 1,500", 8, (1500, 31, 702, 64, 999, 128, 672)),
)
