"""What `kernels_pallas.bench` measures of causal attention."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.bench import Work, pulling_back
from kernels_pallas.causal_attention import causal_attention, shapes
from kernels_pallas.causal_attention.shapes import HEADS, KEY_HEADS, WIDTH, Rows


def works() -> Iterator[Work]:
    """The table; a backward's operations are counted as five products for the forward's two."""
    for name, run, products, moves in (("", _forward, 2, 1), (" backward", _backward, 5, 2)):
        for rows in shapes.ROWS:
            tokens, pairs = sum(rows.lengths), sum(n * (n + 1) / 2 for n in rows.lengths)
            moved = moves * rows.rows * tokens * 2 * (HEADS + KEY_HEADS) * WIDTH * 2
            flops = products * 2 * rows.rows * HEADS * WIDTH * pairs
            yield Work(f"causal attention{name}, {rows.name}", functools.partial(run, rows), moved, flops)


def inputs(rows: Rows) -> tuple[jax.Array, ...]:
    """Queries, keys, values, segments."""
    size = rows.rows, sum(rows.lengths)
    heads = ((HEADS, 0), (KEY_HEADS, 1), (KEY_HEADS, 2))
    segments = np.repeat(np.arange(len(rows.lengths), dtype=np.int32), rows.lengths)[None].repeat(rows.rows, axis=0)
    return *(jax.random.normal(jax.random.key(key), (*size, n, WIDTH), jnp.bfloat16) for n, key in heads), jnp.asarray(segments)


def _forward(rows: Rows, backend: str) -> Callable[[], Any]:
    arguments = inputs(rows)
    call = jax.jit(functools.partial(causal_attention, backend=backend))
    return lambda: call(*arguments)


def _backward(rows: Rows, backend: str) -> Callable[[], Any]:
    *qkv, segments = inputs(rows)
    return pulling_back(lambda *qkv: causal_attention(*qkv, segments, backend=backend), *qkv)
