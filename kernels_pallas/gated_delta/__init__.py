"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464).

It is a linear attention whose recurrent state decays and whose writes replace old values.
"""

from kernels_pallas.gated_delta.api import Chunked, Layer, chunked, recurrent
from kernels_pallas.gated_delta.packed import packed
from kernels_pallas.gated_delta.packing import CHUNK
from kernels_pallas.gated_delta.reference import gated_norm

__all__ = ["CHUNK", "Chunked", "Layer", "chunked", "gated_norm", "packed", "recurrent"]
