"""Frozen dataclasses registered as pytrees."""

import dataclasses
import typing

import jax


@typing.dataclass_transform(frozen_default=True)
def tree_dataclass(cls: type) -> type:
    """Makes a frozen dataclass that is a pytree; fields with metadata {"static": True} are static.

    The annotations of the fields are documentation and not checked, because jax rebuilds the class around any
    leaves: numpy arrays, tracers, shapes, shardings.
    """
    return typing.no_type_check(jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls)))
