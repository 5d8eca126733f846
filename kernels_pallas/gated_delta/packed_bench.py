"""Benchmark lines of the gated delta rule over training's packed rows, for `kernels_pallas.bench`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.benchmarking import Benchmark, backward_call
from kernels_pallas.gated_delta.api import Layer
from kernels_pallas.gated_delta.bench import RULE, TOKEN
from kernels_pallas.gated_delta.packed import packed
from kernels_pallas.gated_delta.shapes import CHANNELS, CONV, HEADS, WIDTH

ROWS, TOKENS = 8, 4096


def benchmarks() -> Iterator[Benchmark]:
    """Yields the benchmark lines."""
    tokens = ROWS * TOKENS
    yield Benchmark("gated delta, packed 8 x 4,096", functools.partial(_run, False), tokens * TOKEN, tokens * RULE)
    yield Benchmark(
        "gated delta backward, packed 8 x 4,096", functools.partial(_run, True), 2 * tokens * TOKEN, 2 * tokens * RULE
    )


def _run(back: bool, backend: str) -> Callable[[], Any]:
    def draw(key: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)

    rows = ROWS, TOKENS
    layer = Layer(draw(3, CHANNELS, CONV), draw(4, HEADS), draw(5, HEADS))
    arguments = draw(0, *rows, CHANNELS), draw(1, *rows, HEADS), draw(2, *rows, HEADS), layer
    segments = jnp.ones(rows, jnp.int32)
    forward = jax.jit(lambda *x: packed(*x, segments, WIDTH, WIDTH, backend=backend))
    return backward_call(forward, *arguments) if back else lambda: forward(*arguments)
