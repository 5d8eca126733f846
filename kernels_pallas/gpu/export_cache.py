"""Lowered kernels that several programs share.

Mosaic GPU writes a kernel in Python, 0.3 to 2 s each, and jax repeats that for every program with the kernel.
A server compiles dozens of such programs. Inside `shared_lowering()` a function marked with `exported_once`
is exported (jax.export) on its first use, and every program calls the export. An export has no gradient.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
from jax import export

# The custom call of the kernels. jax guarantees no compatibility, which matters only for stored exports.
TARGET = "mosaic_gpu_v2"
_exports: ContextVar[dict[Any, export.Exported] | None] = ContextVar("exports", default=None)


@contextlib.contextmanager
def shared_lowering() -> Iterator[None]:
    """Lowers each kernel once per set of shapes for all programs traced inside the context."""
    outer = _exports.set({})
    try:
        yield
    finally:
        _exports.reset(outer)


def exported_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function of GPU kernels so that `shared_lowering` exports it once for each set of shapes.

    Its arguments are arrays or hashable.
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        exports = _exports.get()
        if exports is None:
            return function(*arguments)
        leaves, tree = jax.tree.flatten(arguments)
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        static = tuple(None if isinstance(leaf, jax.Array) else leaf for leaf in leaves)
        key = function, tree, static, tuple((shape.shape, shape.dtype) for shape in shapes)
        if key not in exports:

            def of_arrays(*arrays: jax.Array) -> Any:
                remaining = iter(arrays)
                return function(*tree.unflatten(next(remaining) if leaf is None else leaf for leaf in static))

            check = export.DisabledSafetyCheck.custom_call(TARGET)
            exports[key] = export.export(jax.jit(of_arrays), platforms=("cuda",), disabled_checks=[check])(*shapes)
        return exports[key].call(*arrays)

    return call
