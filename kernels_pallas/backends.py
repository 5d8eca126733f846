"""Backends of an operation: the readable reference for any device, and kernels for families of chips."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

REFERENCE, HOPPER, TPU = "reference", "hopper", "tpu"
ALIASES = {"gpu": HOPPER}  # accepted wherever a backend is given
# Prefixes of `jax.Device.device_kind`, by backend.
DEVICE_KIND_PREFIXES = {
    HOPPER: ("NVIDIA H100", "NVIDIA H200", "NVIDIA H800", "NVIDIA H20", "NVIDIA GH200"),
    TPU: ("TPU v5", "TPU v6", "TPU7"),
}
MIN_JAX_FOR_HOPPER = (0, 11)  # the first jax whose Mosaic GPU has the loads and layouts that the Hopper kernels use


class Implementation(NamedTuple):
    """One backend's implementation of an operation.

    Attributes:
      function: the implementation; all backends of an operation take the same arguments.
      unsupported_reason: why it cannot serve the present arguments; None if it can.
    """

    function: Callable[..., Any]
    unsupported_reason: str | None = None


def mosaic_unsupported_reason() -> str | None:
    """Returns why the installed jax cannot compile the Mosaic GPU kernels, or None if it can."""
    if jax.__version_info__ < MIN_JAX_FOR_HOPPER:
        return f"jax is {jax.__version__}, and the Hopper kernels need {'.'.join(map(str, MIN_JAX_FOR_HOPPER))} or newer"
    return None


def device_kind() -> str:
    """Returns the device kind of the mesh in use, which may describe another machine.

    Without a mesh, returns the default device's kind.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.device_kind if described else jax.devices()[0].device_kind


def backend_of_device(kind: str) -> str | None:
    """Returns the name of the kernel backend for devices of this kind, or None if there is none."""
    return next((backend for backend, kinds in DEVICE_KIND_PREFIXES.items() if kind.startswith(kinds)), None)


def dispatch(backend: str | None, implementations: Mapping[str, Implementation]) -> Callable[..., Any]:
    """Returns the function of the backend to use for an operation.

    Args:
      backend: the backend requested. None selects the kernels for the present device if they serve the
        arguments, else the reference.
      implementations: the operation's implementations by backend name, the reference among them.

    Raises:
      ValueError: the operation has no such backend, or the backend is for other devices.
      NotImplementedError: the backend does not serve these arguments.
    """
    return implementations[_select(backend, implementations)].function


def _select(backend: str | None, implementations: Mapping[str, Implementation]) -> str:
    kind = device_kind()
    if backend is None:
        name = backend_of_device(kind)
        served = name in implementations and implementations[name].unsupported_reason is None
        return name if served else REFERENCE
    name = ALIASES.get(backend, backend)
    if name not in implementations:
        raise ValueError(f"backend is {backend!r}, and this operation has {', '.join(map(repr, implementations))}")
    if (reason := implementations[name].unsupported_reason) is not None:
        raise NotImplementedError(f"backend {name!r}: {reason}; backend {REFERENCE!r} serves it")
    if name != REFERENCE and not kind.startswith(DEVICE_KIND_PREFIXES[name]):
        chips = ", ".join(DEVICE_KIND_PREFIXES[name])
        raise ValueError(f"backend {name!r} is for {chips}, and the device is {kind!r}; backend {REFERENCE!r} runs on it")
    return name
