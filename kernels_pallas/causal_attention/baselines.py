"""Baseline for `kernels_pallas.bench --compare cudnn`: cuDNN's attention through jax on the same rows.

Runs in a process of its own and prints JSON.
"""

import json
import sys
from collections.abc import Callable

import jax

from kernels_pallas.benchmarking import backward_call, device_microseconds
from kernels_pallas.causal_attention.bench import inputs
from kernels_pallas.causal_attention.shapes import CAUSAL


def calls() -> dict[str, Callable[[], object]]:
    """Returns calls of cuDNN's attention by the names of the benchmarks.

    Only rows of one sequence are compared, because jax has no public way to describe packed rows to cuDNN.
    """
    (rows,) = (rows for rows in CAUSAL if len(rows.lengths) == 1)
    *qkv, _ = inputs(rows)
    attend = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"))
    return {
        f"causal attention, {rows.name}": lambda: attend(*qkv),
        f"causal attention backward, {rows.name}": backward_call(attend, *qkv),
    }


if __name__ == "__main__":
    print(json.dumps({name: device_microseconds(call) for name, call in calls().items() if sys.argv[2] in name}))
