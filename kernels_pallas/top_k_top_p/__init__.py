"""Top-k and top-p (nucleus, arXiv:1904.09751) sampling: from which score on a row's tokens may be drawn."""

from kernels_pallas.top_k_top_p.api import sampling_threshold

__all__ = ["sampling_threshold"]
