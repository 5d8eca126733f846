"""flash-linear-attention's Triton kernels on the same workloads; needs torch and fla-core.

`kernels_pallas.bench` runs this module. `fla` is its fused step alone, which does less work than ours.
`fla-layer` adds its kernels for convolution and gated norm. The module runs in a process of its own and
prints its figures as JSON, because two profilers in one process cannot trace the GPU.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

from kernels_pallas.gated_delta import shapes
from kernels_pallas.gated_delta.shapes import CONV, HEADS, WIDTH, RecurrentShape

CALLS = 10


def main(library: str, only: str) -> None:
    """Prints microseconds of the benchmark lines whose names contain `only`, as JSON."""
    if library == "fla-layer":
        steps = [shape for shape in shapes.RECURRENT if shape.tokens == 1]  # its convolution supports one token only
        measures = {f"gated delta step, {shape.name}": functools.partial(recurrent, shape, layer=True) for shape in steps}
    else:
        measures = {f"gated delta, {shape.name}": functools.partial(chunked, shape.lengths) for shape in shapes.CHUNKED}
        backward = functools.partial(chunked, backward=True)
        measures |= {f"gated delta backward, {s.name}": functools.partial(backward, s.lengths) for s in shapes.CHUNKED}
        measures |= {f"gated delta step, {shape.name}": functools.partial(recurrent, shape) for shape in shapes.RECURRENT}
    print(json.dumps({name: measure() for name, measure in measures.items() if only in name}))


def chunked(lengths: tuple[int, ...], backward: bool = False) -> float:
    """Measures forward or backward from convolution to output.

    Norms and gates are computed inside the rule, as in fla's own layer.
    """
    import torch
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.ops.common import chunk_o
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    # fla refuses its backward pass under Triton 3.4 to 3.7, whose results are wrong. Timing still works.
    chunk_o.TRITON_ABOVE_3_7_1 = True
    equal = len(set(lengths)) == 1
    shape = (len(lengths), lengths[0]) if equal else (1, sum(lengths))
    offsets = None if equal else torch.tensor([0, *lengths], device="cuda").cumsum(0)
    qkv = [_leaf(*shape, HEADS * WIDTH) for _ in range(3)]
    a, b, taps = _leaf(*shape, HEADS), _leaf(*shape, HEADS), [_leaf(HEADS * WIDTH, CONV) for _ in range(3)]
    rates, bias = _leaf(HEADS, dtype=torch.float32), _leaf(HEADS, dtype=torch.float32)
    state = torch.zeros(len(lengths), HEADS, WIDTH, WIDTH, device="cuda")

    def forward() -> Any:
        pairs = zip(qkv, taps, strict=True)
        convolved = (causal_conv1d(x, weight=w, activation="silu", cu_seqlens=offsets)[0] for x, w in pairs)
        q, k, v = (x.view(*shape, HEADS, WIDTH) for x in convolved)
        options = dict.fromkeys(("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True)
        gates = {"g": a, "beta": b, "A_log": rates, "dt_bias": bias}
        return chunk_gated_delta_rule(
            q, k, v, **gates, initial_state=state, output_final_state=True, cu_seqlens=offsets, **options
        )[0]

    def without_gradients() -> Any:
        with torch.no_grad():
            return forward()

    if not backward:
        return microseconds(without_gradients)
    out = forward()
    cotangent, leaves = torch.randn_like(out), [*qkv, a, b, *taps, rates, bias]
    return microseconds(lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True))


def recurrent(shape: RecurrentShape, layer: bool = False) -> float:
    """Measures `fused_recurrent`, the rule with norms and gates.

    With `layer`, the measurement includes the convolution and the gated norm, which our kernel also computes.
    """
    import torch
    from fla.modules.causal_conv1d import causal_conv1d_update
    from fla.modules.norm.fused_norm_gate import rms_norm_gated
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    rows, tokens = shape.rows, shape.tokens
    qkv, taps = ([_leaf(*shape) for _ in range(3)] for shape in ((rows, tokens, HEADS * WIDTH), (HEADS * WIDTH, CONV)))
    z, norm = _leaf(rows, tokens, HEADS, WIDTH), _leaf(WIDTH)
    gates = {"g": _leaf(rows, tokens, HEADS), "beta": _leaf(rows, tokens, HEADS)}
    gates |= {"A_log": _leaf(HEADS, dtype=torch.float32), "dt_bias": _leaf(HEADS, dtype=torch.float32)}
    options = dict.fromkeys(("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True)
    layers = [torch.zeros(rows, HEADS, WIDTH, WIDTH, device="cuda") for _ in range(18)]
    caches = [[_leaf(rows, HEADS * WIDTH, CONV) for _ in range(3)] for _ in range(18)]
    turn = [0]

    @torch.no_grad()
    def step() -> Any:
        turn[0] = n = (turn[0] + 1) % len(layers)
        inputs = qkv
        if layer:  # fla's layer also has three convolutions
            parts = zip(qkv, caches[n], taps, strict=True)
            inputs = [causal_conv1d_update(x, cache, weight=w, activation="silu")[0] for x, cache, w in parts]
        q, k, v = (x.view(rows, tokens, HEADS, WIDTH) for x in inputs)
        out, layers[n] = fused_recurrent_gated_delta_rule(
            q, k, v, **gates, initial_state=layers[n], output_final_state=True, **options
        )
        return rms_norm_gated(out, z, norm, None) if layer else out

    return microseconds(step)


def _leaf(*shape: int, dtype: Any = None) -> Any:
    import torch

    return torch.randn(*shape, device="cuda", dtype=dtype or torch.bfloat16).requires_grad_()


def microseconds(call: Callable[[], Any]) -> float:
    """Returns the mean device time of a call, summed over its kernels.

    This is the same measure as `bench.device_microseconds`.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):  # Triton compiles and tunes on the first calls
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    return sum(event.device_time_total for event in trace.key_averages()) / CALLS


if __name__ == "__main__":
    main(*sys.argv[1:])
