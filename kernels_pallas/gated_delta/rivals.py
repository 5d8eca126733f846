"""flash-linear-attention's Triton kernels on the same work, for `kernels_pallas.bench --beside fla`. Needs torch and fla-core."""

from collections.abc import Callable
from typing import Any

from kernels_pallas.gated_delta.shapes import CONV, HEADS, WIDTH, RecurrentShape

CALLS = 10


def chunked(lengths: tuple[int, ...]) -> dict[str, dict[str, Callable[[], float]]]:
    """Convolution to output, as its own layer does it: three convolutions, then the rule with norms and gates inside."""
    import torch
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

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

    def backward() -> float:
        out = forward()
        cotangent, leaves = torch.randn_like(out), [*qkv, a, b, *taps, rates, bias]
        return _microseconds(lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True))

    return {"forward": {"fla": lambda: _microseconds(without_gradients)}, "backward": {"fla": backward}}


def recurrent(shape: RecurrentShape) -> dict[str, Callable[[], float]]:
    """`fused_recurrent`: the rule with norms and gates; without the convolution and the output norm, which ours includes."""
    import torch
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    q, k, v = (_leaf(shape.rows, shape.tokens, HEADS, WIDTH) for _ in range(3))
    a, b = _leaf(shape.rows, shape.tokens, HEADS), _leaf(shape.rows, shape.tokens, HEADS)
    rates, bias = _leaf(HEADS, dtype=torch.float32), _leaf(HEADS, dtype=torch.float32)
    layers = [torch.zeros(shape.rows, HEADS, WIDTH, WIDTH, device="cuda") for _ in range(18)]
    turn = [0]

    def step() -> Any:
        turn[0] = (turn[0] + 1) % len(layers)
        options = dict.fromkeys(("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True)
        with torch.no_grad():
            out, layers[turn[0]] = fused_recurrent_gated_delta_rule(
                q, k, v, g=a, beta=b, A_log=rates, dt_bias=bias, initial_state=layers[turn[0]], output_final_state=True, **options
            )
        return out

    return {"fla": lambda: _microseconds(step)}


def _leaf(*shape: int, dtype: Any = None) -> Any:
    import torch

    return torch.randn(*shape, device="cuda", dtype=dtype or torch.bfloat16).requires_grad_()


def _microseconds(call: Callable[[], Any]) -> float:
    """Mean device time of a call, all of its kernels summed: the same measure as `bench.device_microseconds`."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):  # Triton compiles and tunes
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    return sum(event.device_time_total for event in trace.key_averages()) / CALLS
