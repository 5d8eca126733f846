"""What `kernels_pallas.bench` measures of top-k and top-p."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.bench import Work
from kernels_pallas.top_k_top_p import sampling_threshold, shapes
from kernels_pallas.top_k_top_p.shapes import VOCABULARY, NucleusShape


def works() -> Iterator[Work]:
    """The table. The least that must be moved is every score once; arithmetic is no limit."""
    for shape in shapes.NUCLEUS:
        yield Work(f"nucleus, {shape.name}", functools.partial(_nucleus, shape), 4 * shape.rows * VOCABULARY, 0)


def inputs(shape: NucleusShape) -> list[jax.Array]:
    """Normal logits, as the model's are with random weights."""
    scores = 3 * jax.random.normal(jax.random.key(0), (shape.rows, VOCABULARY))
    top_k, top_p = jnp.full(shape.rows, shape.top_k, jnp.int32), jnp.full(shape.rows, shape.top_p, jnp.float32)
    return [scores, scores.max(axis=-1), top_k, top_p]


def _nucleus(shape: NucleusShape, backend: str) -> Callable[[], Any]:
    arguments, call = inputs(shape), jax.jit(functools.partial(sampling_threshold, backend=backend))
    return lambda: call(*arguments)
