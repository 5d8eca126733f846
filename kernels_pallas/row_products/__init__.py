"""Products of one token with matrices, and what stands before and behind them: norm, activation, residual."""

from kernels_pallas.row_products.api import added_product, normed_products, swiglu_product
from kernels_pallas.row_products.reference import precise, product, rms_norm

__all__ = ["added_product", "normed_products", "precise", "product", "rms_norm", "swiglu_product"]
