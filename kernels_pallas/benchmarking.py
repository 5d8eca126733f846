"""Measurement of device times with jax's profiler.

A `Benchmark` describes one line of an operation's table; the functions time it.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CALLS = 10  # calls of a measurement, whose mean counts


class Benchmark(NamedTuple):
    """One line of an operation's table.

    Attributes:
      name: the operation and the shape.
      run: takes a backend's name; returns a function without arguments that dispatches one call and returns
        its results.
      bytes: the least number of bytes that a call must move.
      flops: the least number of operations that a call must compute.
    """

    name: str
    run: Callable[[str], Callable[[], Any]]
    bytes: float
    flops: float


def backward_call(forward: Callable[..., jax.Array], *arguments: Any) -> Callable[[], Any]:
    """Returns a call of the backward pass alone, for all arguments and a random cotangent."""
    out, pull = jax.vjp(jax.jit(forward), *arguments)
    cotangent = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
    backward = jax.jit(lambda pull, cotangent: pull(cotangent))
    return lambda: backward(pull, cotangent)


def device_microseconds(call: Callable[[], Any]) -> float:
    """Returns the mean device time of a call, the sum over its kernels.

    A first call, which compiles, does not count.
    """
    return sum(us for _, us in kernel_times(call, CALLS)) / CALLS


def kernel_times(call: Callable[[], Any], calls: int) -> list[tuple[str, float]]:
    """Returns name and microseconds of every kernel that the device runs in `calls` calls.

    A first call, which compiles, does not count.
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())
        return list(_kernel_events(Path(folder)))


def _kernel_events(folder: Path) -> Iterator[tuple[str, float]]:
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if plane.name.startswith("/device:"):
                for line in plane.lines:
                    if line.name.startswith(("Stream", "XLA Ops")) and "Async" not in line.name:
                        yield from ((event.name, event.duration_ns / 1e3) for event in line.events)


def device_limits() -> tuple[float, float]:
    """Measures the device's limits.

    Returns:
      Bytes/s of a large copy, read and written, and FLOP/s of a large bfloat16 product.
    """
    x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    y = jax.random.normal(jax.random.key(1), (1 << 30,), jnp.bfloat16)
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    product_us, copy_us = device_microseconds(lambda: product(x, x)), device_microseconds(lambda: copy(y))
    return 2 * y.nbytes / copy_us * 1e6, 2 * x.shape[0] ** 3 / product_us * 1e6
