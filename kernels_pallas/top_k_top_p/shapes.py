"""The real workloads of sampling, one table for tests and benchmarks."""

from typing import NamedTuple

VOCABULARY = 248_094


class TopKTopPShape(NamedTuple):
    """Rows that all have the same parameters."""

    name: str
    rows: int
    top_k: int
    top_p: float


TOP_K_TOP_P = (
    TopKTopPShape("top-p, 1 row", 1, 0, 0.8),
    TopKTopPShape("top-p, 8 rows", 8, 0, 0.8),
    TopKTopPShape("top-p, 32 rows", 32, 0, 0.8),
    TopKTopPShape("top-p, 128 rows", 128, 0, 0.8),
    TopKTopPShape("top-k and top-p, 128 rows", 128, 50, 0.8),
    TopKTopPShape("neither, 128 rows", 128, 0, 1.0),
)
