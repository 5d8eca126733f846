"""Baselines for `kernels_pallas.bench --compare`: other libraries' attention on the same views.

`torch` is PyTorch's variable-length flash attention. `cudnn` is cuDNN's attention through jax, on views
padded to the longest and with their lengths. `cudnn-padded` omits the lengths, so that every view counts as
long as the longest. Runs in a process of its own and prints JSON.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from kernels_pallas.benchmarking import device_microseconds
from kernels_pallas.gated_delta.baselines import microseconds
from kernels_pallas.packed_attention import shapes
from kernels_pallas.packed_attention.shapes import HEADS, WIDTH


def torch(lengths: tuple[int, ...]) -> float:
    """Returns the microseconds of a forward pass."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (torch.randn(sum(lengths), HEADS, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    return microseconds(lambda: varlen_attn(q, k, v, offsets, offsets, max(lengths), max(lengths)))


def cudnn(lengths: tuple[int, ...], ragged: bool) -> float:
    """Returns the microseconds of a forward pass; `ragged` gives cuDNN the views' lengths."""
    shape = (3, len(lengths), max(lengths), HEADS, WIDTH)
    q, k, v = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    sizes = jnp.asarray(lengths, jnp.int32)

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        needed = ragged and len(set(lengths)) > 1
        where = {"query_seq_lengths": sizes, "key_value_seq_lengths": sizes} if needed else {}
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **where)

    return device_microseconds(lambda: attend(q, k, v))


def measured(measure: Callable[[tuple[int, ...]], float], only: str) -> Iterator[tuple[str, float]]:
    """Yields the microseconds by the names of the benchmarks.

    A shape that the library refuses is left out.
    """
    for shape in shapes.PACKED:
        name = f"packed attention, {shape.name}"
        if only in name:
            try:
                yield name, measure(shape.lengths)
            except Exception as error:  # the other library may raise anything; the remaining shapes are still measured
                print(f"{name}: {error}", file=sys.stderr)


BASELINES = {
    "torch": torch,
    "cudnn": functools.partial(cudnn, ragged=True),
    "cudnn-padded": functools.partial(cudnn, ragged=False),
}

if __name__ == "__main__":
    print(json.dumps(dict(measured(BASELINES[sys.argv[1]], sys.argv[2]))))
