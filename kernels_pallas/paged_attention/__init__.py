"""Attention over keys and values in pages (vLLM's PagedAttention, arXiv:2309.06180).

One call serves prefill and decode.
"""

from kernels_pallas.page_size import PAGE
from kernels_pallas.paged_attention.api import paged_attention

__all__ = ["PAGE", "paged_attention"]
