"""Attention over keys and values kept in pages (vLLM's PagedAttention, arXiv:2309.06180): decoding and prompts in one call."""

from kernels_pallas.page_size import PAGE
from kernels_pallas.paged_attention.api import paged_attention

__all__ = ["PAGE", "paged_attention"]
