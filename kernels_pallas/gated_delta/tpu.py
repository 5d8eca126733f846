"""Both operations on TPU: what the kernels serve, and their arguments in the shape that the kernels want."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.gated_delta import tpu_chunked, tpu_recurrent
from kernels_pallas.gated_delta.tpu_math import LANES

HEADS = 8  # of one step of the chunked grid at most: enough independent work to hide the matrix unit's latency
TOKENS = 16  # of one row of a decoding step: they are unrolled
DTYPES = ("float32", "bfloat16")


def gap(
    qkv: Float[Array, "... C"], conv: Float[Array, "C W"], memory: Float32[Array, "S N V K"], tail: Float[Array, "S tail C"]
) -> str | None:
    """Why the kernels do not serve these arguments, or None."""
    (_, N, V, K), W = memory.shape, conv.shape[1]
    if (K, V) != (LANES, LANES):
        return f"memory's widths K and V are {(K, V)}, and it takes {(LANES, LANES)}"
    if qkv.shape[-1] != 3 * N * LANES:
        return f"qkv has {(qkv.shape[-1] - N * V) // (2 * K)} key heads to {N} value heads, and it takes as many of each"
    if 2 * N > LANES:
        return f"memory has {N} heads, and it takes up to {LANES // 2}"
    if W - 1 > tpu_chunked.BEFORE:
        return f"layer.conv has {W} taps, and it takes up to {tpu_chunked.BEFORE + 1}"
    if str(qkv.dtype) not in DTYPES or tail.dtype != qkv.dtype:
        return f"qkv is {qkv.dtype} and tail {tail.dtype}, and it takes {' or '.join(DTYPES)} for both"
    return None


def step_gap(
    qkv: Float[Array, "B T C"], conv: Float[Array, "C W"], memory: Float32[Array, "S N V K"], tail: Float[Array, "S tail C"]
) -> str | None:
    """Why the kernel does not serve these arguments of `recurrent`, or None."""
    if qkv.shape[1] > TOKENS:
        return f"qkv has {qkv.shape[1]} tokens a row, and it takes up to {TOKENS}"
    return gap(qkv, conv, memory, tail)


def chunked(
    qkv: Float[Array, "T C"],
    a: Float[Array, "T N"],
    b: Float[Array, "T N"],
    conv: Float[Array, "C W"],
    a_log: Float[Array, " N"],
    dt_bias: Float[Array, " N"],
    memory: Float32[Array, "S N V K"],
    tail: Float[Array, "S tail C"],
    starts: Int32[Array, " S"],
    lengths: Int32[Array, " S"],
    snapshots: Int32[Array, "P 2"],
) -> tuple[Float[Array, "T N V"], Float32[Array, "S N V K"], Float32[Array, "P N V K"]]:
    """`api.chunked`, less the tails."""
    T, (_, N, V, _) = qkv.shape[0], memory.shape
    padding = max(tpu_chunked.WINDOW, -(-T // tpu_chunked.TILE) * tpu_chunked.TILE) - T
    qkv = jnp.pad(qkv, ((0, padding), (0, 0)))
    at = tpu_chunked.places(starts, lengths, snapshots, T + padding)
    gates = jnp.pad(_gate_inputs(a, b), ((0, padding), (0, 0)))
    layer = _layer(conv, a_log, dt_bias)
    out, ends, kept = tpu_chunked.forward(qkv, gates, *layer, memory, tail, at, len(snapshots), _heads(N))
    return out[:T].reshape(T, N, V), ends, kept


def recurrent(
    qkv: Float[Array, "B T C"],
    a: Float[Array, "B T N"],
    b: Float[Array, "B T N"],
    z: Float[Array, "B T N V"],
    conv: Float[Array, "C W"],
    a_log: Float[Array, " N"],
    dt_bias: Float[Array, " N"],
    norm: Float[Array, " V"],
    eps: float,
    memory: Float32[Array, "S N V K"],
    tail: Float[Array, "S tail C"],
    slots: Int32[Array, " B"],
    keep: Int32[Array, " B"],
) -> tuple[Float[Array, "B T N V"], Float32[Array, "S N V K"], Float[Array, "S tail C"]]:
    """`api.recurrent`."""
    norm = norm.astype(jnp.float32)[None]
    layer = _layer(conv, a_log, dt_bias)
    return tpu_recurrent.step(qkv, _gate_inputs(a, b), z, *layer, norm, eps, memory, tail, slots, keep)


def _heads(N: int) -> int:
    """Heads of one step of the grid: the most that divide N."""
    return max(heads for heads in range(1, HEADS + 1) if N % heads == 0)


def _gate_inputs(a: Float[Array, "*tokens N"], b: Float[Array, "*tokens N"]) -> Float32[Array, "*tokens lanes"]:
    """`a` and `b` side by side in rows of 128, which is the least that a row takes up anyway."""
    both = jnp.concatenate([a.astype(jnp.float32), b.astype(jnp.float32)], axis=-1)
    return jnp.pad(both, [(0, 0)] * (both.ndim - 1) + [(0, LANES - both.shape[-1])])


def _layer(
    conv: Float[Array, "C W"], a_log: Float[Array, " N"], dt_bias: Float[Array, " N"]
) -> tuple[Float32[Array, "W C"], Float32[Array, "1 lanes"], Float32[Array, "1 lanes"]]:
    """The filters by tap, and decay rate and bias in rows of 128."""
    rate, bias = (
        jnp.pad(x, (0, LANES - len(x)))[None] for x in (jnp.exp(a_log.astype(jnp.float32)), dt_bias.astype(jnp.float32))
    )
    return conv.astype(jnp.float32).T, rate, bias
