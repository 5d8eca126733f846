"""This model's real workloads: one table for tests and benchmark."""

from typing import NamedTuple

WIDTH, INNER = 1024, 3584  # of the residual stream and within the MLP


class RowShape(NamedTuple):
    """Products of a layer: inputs, and the outputs of each matrix.

    `kind` is "normed", "swiglu" (two matrices that meet in one output) or "added".
    """

    name: str
    kind: str
    inputs: int
    outputs: tuple[int, ...]


ROWS = (
    RowShape("into a gated delta net", "normed", WIDTH, (6144, 16, 16, 2048)),
    RowShape("into attention", "normed", WIDTH, (4096, 512, 512)),
    RowShape("out of either", "added", 2048, (WIDTH,)),
    RowShape("into the MLP", "swiglu", WIDTH, (INNER, INNER)),
    RowShape("out of the MLP", "added", INNER, (WIDTH,)),
)
