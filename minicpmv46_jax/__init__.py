"""MiniCPM-V 4.6 in JAX: OpenBMB's multimodal model for TPU, GPU and, small, CPU."""

from minicpmv46_jax.library import Delta, MiniCPMV

__version__ = "0.1.0"

__all__ = ["Delta", "MiniCPMV"]
