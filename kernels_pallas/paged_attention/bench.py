"""What `kernels_pallas.bench` measures of paged attention."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.bench import Work
from kernels_pallas.paged_attention import PAGE, paged_attention, shapes
from kernels_pallas.paged_attention.shapes import HEADS, KEY_HEADS, WIDTH, PagedShape

TOKEN = 2 * KEY_HEADS * WIDTH * 2  # bytes of a token's keys and values


def works() -> Iterator[Work]:
    """The table. A query's operations are those over the tokens that it sees."""
    for shape in shapes.PAGED:
        moved = sum(shape.contexts) * TOKEN + 2 * sum(shape.lengths) * HEADS * WIDTH * 2
        yield Work(f"paged attention, {shape.name}", functools.partial(_paged, shape), moved, flops(shape))


def flops(shape: PagedShape) -> float:
    """Operations over the tokens that each query sees."""
    seen = sum(n * c - n * (n - 1) / 2 for n, c in zip(shape.lengths, shape.contexts, strict=True))
    return 4 * HEADS * WIDTH * seen


def _paged(shape: PagedShape, backend: str) -> Callable[[], Any]:
    counts = [-(-context // PAGE) for context in shape.contexts]
    order, at = np.random.default_rng(0).permutation(sum(counts)), 0
    tables = np.zeros((len(counts), max(counts)), np.int32)
    for row, count in zip(tables, counts, strict=True):
        row[:count], at = order[at : at + count], at + count
    pool = (2, sum(counts), PAGE, KEY_HEADS * WIDTH)
    keys, values = jax.random.normal(jax.random.key(0), pool, jnp.bfloat16)
    q = jax.random.normal(jax.random.key(1), (sum(shape.lengths), HEADS, WIDTH), jnp.bfloat16)
    starts = np.cumsum([0, *shape.lengths[:-1]])
    where = [jnp.asarray(x, jnp.int32) for x in (tables, starts, shape.lengths, shape.contexts)]
    call = jax.jit(functools.partial(paged_attention, longest=shape.longest, backend=backend))
    return lambda: call(q, keys, values, *where)
