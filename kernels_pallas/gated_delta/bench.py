"""Benchmark lines of the gated delta rule for `kernels_pallas.bench`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import gated_delta
from kernels_pallas.benchmarking import Benchmark, backward_call
from kernels_pallas.gated_delta import shapes
from kernels_pallas.gated_delta.shapes import CHANNELS, CONV, HEADS, WIDTH, ChunkedShape, RecurrentShape

STATE = HEADS * WIDTH * WIDTH * 4  # bytes of one sequence's recurrent state
TOKEN = (CHANNELS + 2 * HEADS + HEADS * WIDTH) * 2  # bytes of a token's inputs and outputs
# Minimum operations per token: writing and reading the state, without the work of ordering a chunk's writes.
RULE = HEADS * 3 * 2 * WIDTH * WIDTH


def benchmarks() -> Iterator[Benchmark]:
    """Yields the benchmark lines."""
    for shape in shapes.CHUNKED:
        tokens, sequences = sum(shape.lengths), len(shape.lengths)
        moved = tokens * TOKEN + 2 * sequences * STATE
        yield Benchmark(f"gated delta, {shape.name}", functools.partial(_chunked, shape), moved, tokens * RULE)
    for shape in shapes.CHUNKED:
        tokens, sequences = sum(shape.lengths), len(shape.lengths)
        moved = 2 * tokens * TOKEN + 4 * sequences * STATE
        backward = functools.partial(_backward, shape)
        yield Benchmark(f"gated delta backward, {shape.name}", backward, moved, 2 * tokens * RULE)
    for shape in shapes.RECURRENT:
        tokens = shape.rows * shape.tokens
        moved = 2 * shape.rows * STATE + tokens * (TOKEN + HEADS * WIDTH * 2)
        yield Benchmark(f"gated delta step, {shape.name}", functools.partial(_recurrent, shape), moved, tokens * RULE)


def _draw(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32), jnp.bfloat16)


def _layer(rng: np.random.Generator) -> gated_delta.Layer:
    return gated_delta.Layer(_draw(rng, CHANNELS, CONV), _draw(rng, HEADS), _draw(rng, HEADS))


def _chunked_inputs(shape: ChunkedShape) -> tuple[Any, ...]:
    rng, tokens, sequences = np.random.default_rng(0), sum(shape.lengths), len(shape.lengths)
    query_starts = jnp.asarray(np.cumsum([0, *shape.lengths[:-1]]), jnp.int32)
    projected = (_draw(rng, tokens, width) for width in (CHANNELS, HEADS, HEADS))
    recurrent_state = jnp.zeros((sequences, HEADS, WIDTH, WIDTH), jnp.float32)
    conv_state = _draw(rng, sequences, CONV - 1, CHANNELS)
    return *projected, _layer(rng), recurrent_state, conv_state, query_starts, jnp.asarray(shape.lengths, jnp.int32)


def _chunked(shape: ChunkedShape, backend: str) -> Callable[[], Any]:
    call = jax.jit(functools.partial(gated_delta.chunked, backend=backend))
    inputs = _chunked_inputs(shape)
    return lambda: call(*inputs).out


def _backward(shape: ChunkedShape, backend: str) -> Callable[[], Any]:
    *differentiable, query_starts, query_lens = _chunked_inputs(shape)

    def forward(*inputs: Any) -> jax.Array:
        return gated_delta.chunked(*inputs, query_starts, query_lens, backend=backend).out

    return backward_call(forward, *differentiable)


def _recurrent(shape: RecurrentShape, backend: str) -> Callable[[], Any]:
    rng, rows, tokens = np.random.default_rng(0), shape.rows, shape.tokens
    projected = [_draw(rng, rows, tokens, width) for width in (CHANNELS, HEADS, HEADS)]
    z, layer, norm = _draw(rng, rows, tokens, HEADS, WIDTH), _layer(rng), _draw(rng, WIDTH)
    slots, keep = jnp.arange(rows, dtype=jnp.int32), jnp.full(rows, tokens, jnp.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        out, *state = gated_delta.recurrent(*projected, z, layer, norm, 1e-6, *state, slots, keep, backend=backend)
        return out, tuple(state)

    # One state per layer of the model, in turn. A single state would stay in the cache from call to call.
    layers = [(jnp.zeros((rows, HEADS, WIDTH, WIDTH)), _draw(rng, rows, CONV - 1, CHANNELS)) for _ in range(18)]
    turn = [0]

    def call() -> jax.Array:
        turn[0] = (turn[0] + 1) % len(layers)
        out, layers[turn[0]] = step(layers[turn[0]])
        return out

    return call
