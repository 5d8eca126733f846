"""Other libraries' attention on the same views, for `kernels_pallas.bench --beside`: a process of its own, which prints JSON.

`torch` is PyTorch's variable-length flash attention; `cudnn` is cuDNN's through jax, on the views padded to the longest and told
how long each is; `cudnn-padded` is the same untold, so that every view is as long as the longest.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator

from kernels_pallas.packed_attention import shapes
from kernels_pallas.packed_attention.shapes import HEADS, WIDTH


def torch(lengths: tuple[int, ...]) -> float:
    """Microseconds of a forward."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    from kernels_pallas.gated_delta.baselines import microseconds

    q, k, v = (torch.randn(sum(lengths), HEADS, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    return microseconds(lambda: varlen_attn(q, k, v, offsets, offsets, max(lengths), max(lengths)))


def cudnn(lengths: tuple[int, ...], told: bool) -> float:
    """Microseconds of a forward."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas.benchmarking import device_microseconds

    shape = (3, len(lengths), max(lengths), HEADS, WIDTH)
    q, k, v = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    sizes = jnp.asarray(lengths, jnp.int32)

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        ragged = told and len(set(lengths)) > 1
        where = {"query_seq_lengths": sizes, "key_value_seq_lengths": sizes} if ragged else {}
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **where)

    return device_microseconds(lambda: attend(q, k, v))


def measured(measure: Callable[[tuple[int, ...]], float], only: str) -> Iterator[tuple[str, float]]:
    """By the names that `bench` gives its lines; a shape that the library refuses is left out."""
    for shape in shapes.PACKED:
        name = f"packed attention, {shape.name}"
        if only in name:
            try:
                yield name, measure(shape.lengths)
            except Exception as error:  # another library's, of any kind: said, and the table goes on
                print(f"{name}: {error}", file=sys.stderr)


BASELINES = {
    "torch": torch,
    "cudnn": functools.partial(cudnn, told=True),
    "cudnn-padded": functools.partial(cudnn, told=False),
}

if __name__ == "__main__":
    print(json.dumps(dict(measured(BASELINES[sys.argv[1]], sys.argv[2]))))
