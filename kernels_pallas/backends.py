"""Who runs an operation: the readable reference anywhere, or a kernel on the chips it was written for."""

from collections.abc import Mapping

import jax

REFERENCE = "reference"
# The start of the device kinds (jax.Device.device_kind) that each kernel backend serves.
CHIPS = {
    "gpu": ("NVIDIA H100", "NVIDIA H200", "NVIDIA H800", "NVIDIA H20", "NVIDIA GH200"),
    "tpu": ("TPU v5", "TPU v6", "TPU7"),
}
MOSAIC_GPU = (0, 11)  # it is young: jax 0.10's loads and layouts are others


def mosaic_gap() -> str | None:
    """What the present jax lacks for kernels in Mosaic GPU, or None."""
    if jax.__version_info__ < MOSAIC_GPU:
        return f"jax is {jax.__version__}, and it takes {'.'.join(map(str, MOSAIC_GPU))} or newer"
    return None


def device_kind() -> str:
    """The kind of device being compiled for: of the mesh in use, which may be another machine's, or of the default device."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.device_kind if described else jax.devices()[0].device_kind


def choose(backend: str | None, gaps: Mapping[str, str | None]) -> str:
    """The backend to use.

    Args:
      backend: the one asked for; None takes the kernel for the present device if it serves the arguments, else the reference.
      gaps: for each backend that the operation has, what it lacks for the present arguments, or None.

    Raises:
      ValueError: there is no such backend, or it is for other devices.
      NotImplementedError: it does not serve these arguments.
    """
    kind = device_kind()
    if backend is None:
        fitting = (name for name, gap in gaps.items() if name != REFERENCE and gap is None and kind.startswith(CHIPS[name]))
        return next(fitting, REFERENCE)
    if backend not in gaps:
        raise ValueError(f"backend is {backend!r}, and this operation has {', '.join(map(repr, gaps))}")
    if gaps[backend] is not None:
        raise NotImplementedError(f"backend {backend!r}: {gaps[backend]}; backend {REFERENCE!r} serves it")
    if backend != REFERENCE and not kind.startswith(CHIPS[backend]):
        served = ", ".join(CHIPS[backend])
        raise ValueError(f"backend {backend!r} is for {served}, and the device is {kind!r}; backend {REFERENCE!r} runs on it")
    return backend
