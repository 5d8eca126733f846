"""Kernels that are lowered once for many programs.

Mosaic GPU writes a kernel in Python, 0.3 to 2 s each, and jax does so again for every program that has it: 28 of a server's
decode or read, in eight shapes. Inside `lowered_once()` the functions marked with `once` are exported on their first use
(jax.export), and every program calls what was exported. It has no gradient: this is for who compiles programs without.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
from jax import export

# The custom call that kernels become. jax promises nothing of it to who keeps an export, which nobody does here.
TARGET = "mosaic_gpu_v2"
_exports: ContextVar[dict[Any, export.Exported] | None] = ContextVar("exports", default=None)


@contextlib.contextmanager
def lowered_once() -> Iterator[None]:
    """Within it, and for as long as it lasts, a kernel is lowered once for the same shapes."""
    before = _exports.set({})
    try:
        yield
    finally:
        _exports.reset(before)


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function of arrays, and of other things that are hashable, whose kernels are for a GPU."""

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
                given = iter(arrays)
                return function(*tree.unflatten(next(given) if leaf is None else leaf for leaf in static))

            check = export.DisabledSafetyCheck.custom_call(TARGET)
            exports[key] = export.export(jax.jit(of_arrays), platforms=("cuda",), disabled_checks=[check])(*shapes)
        return exports[key].call(*arrays)

    return call
