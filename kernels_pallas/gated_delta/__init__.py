"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464): a linear attention whose state forgets and overwrites."""

from kernels_pallas.gated_delta.reference import CHUNK, causal_conv, chunked, recurrent

__all__ = ["CHUNK", "causal_conv", "chunked", "recurrent"]
