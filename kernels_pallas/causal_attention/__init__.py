"""Causal attention over rows that hold several sequences, for training's text layers."""

from kernels_pallas.causal_attention.api import causal_attention

__all__ = ["causal_attention"]
