"""Attention over many images packed in one row, each within itself (NaViT, arXiv:2307.06304)."""

from kernels_pallas.packed_attention.api import packed_attention, window_attention

__all__ = ["packed_attention", "window_attention"]
