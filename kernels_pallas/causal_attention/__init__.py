"""Causal attention over rows that hold several sequences: what training's text layers read."""

from kernels_pallas.causal_attention.api import causal_attention

__all__ = ["causal_attention"]
