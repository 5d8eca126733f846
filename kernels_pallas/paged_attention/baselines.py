"""Baseline for `kernels_pallas.bench --compare torch`: PyTorch's flash attention.

Keys and values are contiguous. It takes one length per call, so ragged shapes have no baseline. Runs in a
process of its own and prints JSON.
"""

import json
import sys

from kernels_pallas.gated_delta.baselines import microseconds
from kernels_pallas.paged_attention import shapes
from kernels_pallas.paged_attention.shapes import HEADS, KEY_HEADS, WIDTH, PagedShape


def flash(shape: PagedShape) -> float:
    """Returns the microseconds of a call."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention

    rows, queries, context = len(shape.query_lens), shape.query_lens[0], shape.context_lens[0]
    # With a causal bias it has no grouped heads, so each key-value head is stored four times.
    heads = KEY_HEADS if queries == 1 else HEADS
    q = torch.randn(rows, HEADS, queries, WIDTH, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(rows, heads, context, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    options = {"enable_gqa": True} if queries == 1 else {"attn_mask": causal_lower_right(queries, context)}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
        return microseconds(lambda: scaled_dot_product_attention(q, k, v, **options))


def main(only: str) -> None:
    """Prints the microseconds by the names of the benchmarks that contain `only`."""
    even = [shape for shape in shapes.PAGED if len({*zip(shape.query_lens, shape.context_lens, strict=True)}) == 1]
    names = {f"paged attention, {shape.name}": shape for shape in even}
    print(json.dumps({name: flash(shape) for name, shape in names.items() if only in name}))


if __name__ == "__main__":
    main(sys.argv[2])
