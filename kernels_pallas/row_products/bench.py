"""What `kernels_pallas.bench` measures of one row's products."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.bench import Work
from kernels_pallas.row_products import added_product, normed_products, swiglu_product
from kernels_pallas.row_products.shapes import ROWS, RowShape

SETS = 8  # of weights, used in turn: those of one layer would stay in the chip's cache from call to call


def works() -> Iterator[Work]:
    """The table: a layer's products, one after another with different weights in one call."""
    for shape in ROWS:
        weights = SETS * shape.inputs * sum(shape.outputs)
        yield Work(f"row products, {shape.name}, {SETS} times", functools.partial(_products, shape), 2 * weights, 2 * weights)


def _products(shape: RowShape, backend: str) -> Callable[[], Any]:
    keys = iter(jax.random.split(jax.random.key(0), 3 + SETS * len(shape.outputs)))
    x, norm, residual = (jax.random.normal(next(keys), s, jnp.bfloat16) for s in ((1, shape.inputs), (shape.inputs,), (1, 1024)))
    sets = [[jax.random.normal(next(keys), (n, shape.inputs), jnp.bfloat16) for n in shape.outputs] for _ in range(SETS)]

    @jax.jit
    def one(weights):
        match shape.kind:
            case "normed":
                return normed_products(x, norm, 1e-6, weights, backend=backend)
            case "swiglu":
                return swiglu_product(x, norm, 1e-6, *weights, backend=backend)
            case "added":
                return added_product(x, *weights, residual, backend=backend)

    call = jax.jit(lambda sets: [one(weights) for weights in sets])
    return lambda: call(sets)
