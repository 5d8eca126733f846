"""Top-k and top-p (nucleus, arXiv:1904.09751) sampling: the lowest score that may be sampled."""

from kernels_pallas.top_k_top_p.api import sampling_threshold

__all__ = ["sampling_threshold"]
