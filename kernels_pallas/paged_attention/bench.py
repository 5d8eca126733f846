"""Benchmarks of paged attention."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.benchmarking import Benchmark
from kernels_pallas.paged_attention import PAGE, paged_attention, shapes
from kernels_pallas.paged_attention.shapes import HEADS, KEY_HEADS, WIDTH, PagedShape

TOKEN = 2 * KEY_HEADS * WIDTH * 2  # bytes of a token's keys and values


def benchmarks() -> Iterator[Benchmark]:
    """Yields the benchmarks; operations count for the tokens that each query sees."""
    for shape in shapes.PAGED:
        moved = sum(shape.context_lens) * TOKEN + 2 * sum(shape.query_lens) * HEADS * WIDTH * 2
        yield Benchmark(f"paged attention, {shape.name}", functools.partial(_paged, shape), moved, flops(shape))


def flops(shape: PagedShape) -> float:
    """Returns the operations over the tokens that each query sees."""
    seen = sum(n * c - n * (n - 1) / 2 for n, c in zip(shape.query_lens, shape.context_lens, strict=True))
    return 4 * HEADS * WIDTH * seen


def _paged(shape: PagedShape, backend: str) -> Callable[[], Any]:
    counts = [-(-context // PAGE) for context in shape.context_lens]
    order, at = np.random.default_rng(0).permutation(sum(counts)), 0
    block_tables = np.zeros((len(counts), max(counts)), np.int32)
    for row, count in zip(block_tables, counts, strict=True):
        row[:count], at = order[at : at + count], at + count
    pool = (2, sum(counts), PAGE, KEY_HEADS * WIDTH)
    keys, values = jax.random.normal(jax.random.key(0), pool, jnp.bfloat16)
    q = jax.random.normal(jax.random.key(1), (sum(shape.query_lens), HEADS, WIDTH), jnp.bfloat16)
    query_starts = np.cumsum([0, *shape.query_lens[:-1]])
    where = [jnp.asarray(x, jnp.int32) for x in (block_tables, query_starts, shape.query_lens, shape.context_lens)]
    call = jax.jit(functools.partial(paged_attention, max_query_len=shape.max_query_len, backend=backend))
    return lambda: call(q, keys, values, *where)
