"""Benchmarks of top-k and top-p."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.benchmarking import Benchmark
from kernels_pallas.top_k_top_p import sampling_threshold, shapes
from kernels_pallas.top_k_top_p.shapes import VOCABULARY, TopKTopPShape


def benchmarks() -> Iterator[Benchmark]:
    """Yields the benchmarks.

    The least to be moved is every score once; arithmetic is not a limit.
    """
    for shape in shapes.TOP_K_TOP_P:
        yield Benchmark(f"top-k top-p, {shape.name}", functools.partial(_threshold, shape), 4 * shape.rows * VOCABULARY, 0)


def inputs(shape: TopKTopPShape) -> list[jax.Array]:
    """Returns normal logits, like those of the model with random weights, and the sampling parameters."""
    scores = 3 * jax.random.normal(jax.random.key(0), (shape.rows, VOCABULARY))
    top_k, top_p = jnp.full(shape.rows, shape.top_k, jnp.int32), jnp.full(shape.rows, shape.top_p, jnp.float32)
    return [scores, scores.max(axis=-1), top_k, top_p]


def _threshold(shape: TopKTopPShape, backend: str) -> Callable[[], Any]:
    arguments, call = inputs(shape), jax.jit(functools.partial(sampling_threshold, backend=backend))
    return lambda: call(*arguments)
