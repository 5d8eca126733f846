"""MiniCPM-V 4.6 in JAX: OpenBMB's multimodal model on TPU, GPU and, for small models, CPU."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicpmv46_jax.library import Delta, MiniCPMV

__version__ = "0.1.0"

__all__ = ["Delta", "MiniCPMV"]


def __getattr__(name: str) -> Any:
    """Imports the names above on first use, so that image preparation does not import jax."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from minicpmv46_jax import library

    return getattr(library, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
