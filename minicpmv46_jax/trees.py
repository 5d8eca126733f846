"""Frozen dataclasses that jax takes apart and puts together."""

import dataclasses
import typing

import jax


@typing.dataclass_transform(frozen_default=True)
def tree_dataclass(cls: type) -> type:
    """A frozen dataclass registered as a pytree; fields with metadata {"static": True} are part of its structure.

    The annotations of its fields say what it holds. They are not checked: jax rebuilds it around whatever leaves a transformation
    has, numpy arrays, tracers, shapes, shardings.
    """
    return typing.no_type_check(jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls)))
