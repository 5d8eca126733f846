"""Top-k and top-p (nucleus, arXiv:1904.09751) sampling: from which score on a row's tokens may be drawn."""

from kernels_pallas.top_k_top_p.api import lowest_kept

__all__ = ["lowest_kept"]
