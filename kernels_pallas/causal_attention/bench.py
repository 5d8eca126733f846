"""Benchmarks of causal attention."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.benchmarking import Benchmark, backward_call
from kernels_pallas.causal_attention import causal_attention, shapes
from kernels_pallas.causal_attention.shapes import HEADS, KEY_HEADS, WIDTH, CausalShape


def benchmarks() -> Iterator[Benchmark]:
    """Yields the benchmarks; a backward pass counts as five products where the forward has two."""
    for name, run, products, moves in (("", _forward, 2, 1), (" backward", _backward, 5, 2)):
        for rows in shapes.CAUSAL:
            tokens, pairs = sum(rows.lengths), sum(n * (n + 1) / 2 for n in rows.lengths)
            moved = moves * rows.rows * tokens * 2 * (HEADS + KEY_HEADS) * WIDTH * 2
            flops = products * 2 * rows.rows * HEADS * WIDTH * pairs
            yield Benchmark(f"causal attention{name}, {rows.name}", functools.partial(run, rows), moved, flops)


def inputs(rows: CausalShape) -> tuple[jax.Array, ...]:
    """Returns random queries, keys and values, and the segments."""
    size = rows.rows, sum(rows.lengths)
    heads = ((HEADS, 0), (KEY_HEADS, 1), (KEY_HEADS, 2))
    segments = np.repeat(np.arange(len(rows.lengths), dtype=np.int32), rows.lengths)[None].repeat(rows.rows, axis=0)
    return *(jax.random.normal(jax.random.key(key), (*size, n, WIDTH), jnp.bfloat16) for n, key in heads), jnp.asarray(segments)


def _forward(rows: CausalShape, backend: str) -> Callable[[], Any]:
    arguments = inputs(rows)
    call = jax.jit(functools.partial(causal_attention, backend=backend))
    return lambda: call(*arguments)


def _backward(rows: CausalShape, backend: str) -> Callable[[], Any]:
    *qkv, segments = inputs(rows)
    return backward_call(lambda *qkv: causal_attention(*qkv, segments, backend=backend), *qkv)
