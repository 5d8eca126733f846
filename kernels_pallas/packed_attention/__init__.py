"""Attention over many pictures laid in one row, each picture attending within itself (NaViT, arXiv:2307.06304)."""

from kernels_pallas.packed_attention.api import packed_attention, window_attention

__all__ = ["packed_attention", "window_attention"]
