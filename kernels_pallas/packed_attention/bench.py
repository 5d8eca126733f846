"""Benchmarks of packed attention."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.benchmarking import Benchmark, backward_call
from kernels_pallas.packed_attention import packed_attention, shapes, window_attention
from kernels_pallas.packed_attention.shapes import HEADS, WIDTH, PackedShape

ROW = HEADS * WIDTH * 2  # bytes of a patch's queries, keys or values
WINDOW = 4


def benchmarks() -> Iterator[Benchmark]:
    """Yields the benchmarks.

    Operations count at the heads' own width. A backward pass counts as five products where the forward has
    two.
    """
    for shape in shapes.PACKED:
        patches, flops = sum(shape.lengths), 4 * HEADS * WIDTH * sum(n * n for n in shape.lengths)
        yield Benchmark(f"packed attention, {shape.name}", functools.partial(_forward, shape), 4 * patches * ROW, flops)
    for shape in shapes.PACKED:
        patches, flops = sum(shape.lengths), 10 * HEADS * WIDTH * sum(n * n for n in shape.lengths)
        yield Benchmark(f"packed attention backward, {shape.name}", functools.partial(_backward, shape), 8 * patches * ROW, flops)
    photos = shapes.PHOTO * 16
    flops = 4 * HEADS * WIDTH * sum(photos) * WINDOW
    yield Benchmark(
        "packed attention, 2x2 windows of 16 photos", functools.partial(_windows, sum(photos)), 4 * sum(photos) * ROW, flops
    )


def inputs(shape: PackedShape) -> tuple[list[jax.Array], dict[str, Any]]:
    """Returns random queries, keys and values, and the starts and lengths of the views."""
    where = {
        "starts": jnp.asarray(np.cumsum([0, *shape.lengths[:-1]]), jnp.int32),
        "lengths": jnp.asarray(shape.lengths, jnp.int32),
    }
    return _draw(-(-sum(shape.lengths) // 16) * 16), where


def _draw(rows: int) -> list[jax.Array]:
    return list(jax.random.normal(jax.random.key(0), (3, rows, HEADS, WIDTH), jnp.bfloat16))


def _forward(shape: PackedShape, backend: str) -> Callable[[], Any]:
    qkv, where = inputs(shape)
    call = jax.jit(functools.partial(packed_attention, longest=shape.longest, backend=backend))
    return lambda: call(*qkv, **where)


def _backward(shape: PackedShape, backend: str) -> Callable[[], Any]:
    qkv, where = inputs(shape)
    forward = functools.partial(packed_attention, longest=shape.longest, backend=backend)
    return backward_call(lambda *qkv: forward(*qkv, **where), *qkv)


def _windows(rows: int, backend: str) -> Callable[[], Any]:
    qkv = _draw(rows)
    call = jax.jit(functools.partial(window_attention, window=WINDOW, backend=backend))
    return lambda: call(*qkv)
