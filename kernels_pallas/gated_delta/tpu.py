"""Both operations on TPU: the supported arguments, and the layouts that the kernels expect."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.gated_delta import backward, tpu_backward, tpu_chunked, tpu_recurrent
from kernels_pallas.gated_delta.arguments import ChunkedArguments
from kernels_pallas.gated_delta.packing import chunk_table
from kernels_pallas.gated_delta.tpu_math import LANES, LayerRows
from kernels_pallas.tuning import tuned_config

TOKENS = 8  # maximum per row of a decode step, because the kernel unrolls them
DTYPES = ("float32", "bfloat16")


def unsupported_reason(
    qkv: Float[Array, "... C"],
    conv: Float[Array, "C W"],
    recurrent_state: Float32[Array, "S N V K"],
    conv_state: Float[Array, "S history C"],
) -> str | None:
    """Returns why the kernels do not support these arguments, or None."""
    (_, N, V, K), W = recurrent_state.shape, conv.shape[1]
    if (K, V) != (LANES, LANES):
        return f"recurrent_state's widths K and V are {(K, V)}, and it takes {(LANES, LANES)}"
    if qkv.shape[-1] != 3 * N * LANES:
        return f"qkv has {(qkv.shape[-1] - N * V) // (2 * K)} key heads to {N} value heads, and it takes as many of each"
    if 2 * N > LANES:
        return f"recurrent_state has {N} heads, and it takes up to {LANES // 2}"
    if W - 1 > tpu_chunked.LOOKBACK:
        return f"layer.conv has {W} taps, and it takes up to {tpu_chunked.LOOKBACK + 1}"
    if str(qkv.dtype) not in DTYPES or conv_state.dtype != qkv.dtype:
        return f"qkv is {qkv.dtype} and conv_state {conv_state.dtype}, and it takes {' or '.join(DTYPES)} for both"
    return None


def step_unsupported_reason(
    qkv: Float[Array, "B T C"],
    conv: Float[Array, "C W"],
    recurrent_state: Float32[Array, "S N V K"],
    conv_state: Float[Array, "S history C"],
) -> str | None:
    """Returns why the kernel does not support these arguments of `recurrent`, or None."""
    if qkv.shape[1] > TOKENS:
        return f"qkv has {qkv.shape[1]} tokens a row, and it takes up to {TOKENS}"
    return unsupported_reason(qkv, conv, recurrent_state, conv_state)


@jax.custom_vjp
def chunked(
    arguments: ChunkedArguments,
) -> tuple[Float[Array, "T N V"], Float32[Array, "S N V K"], Float32[Array, "P N V K"]]:
    """Computes `api.chunked` without the conv states."""
    out, final_states, snapshot_states = _forward(arguments)
    return out, final_states, snapshot_states


def _forward(arguments: ChunkedArguments, *, save_states: bool = False) -> tuple[Array, ...]:
    """Computes `chunked`, and with `save_states` the state before each chunk."""
    qkv, a, b, conv, a_log, dt_bias, recurrent_state, conv_state, query_starts, query_lens, snapshots = arguments
    T, (_, N, V, _) = qkv.shape[0], recurrent_state.shape
    padding = _padded_len(T) - T
    windows = tpu_chunked.chunk_windows(query_starts, query_lens, snapshots, T + padding)
    qkv, gates = (jnp.pad(x, ((0, padding), (0, 0))) for x in (qkv, _gate_inputs(a, b)))
    layer = _layer_rows(conv, a_log, dt_bias)
    out, *states = tpu_chunked.forward(
        qkv, gates, layer, recurrent_state, conv_state, windows, len(snapshots), _heads_per_step(N), save_states
    )
    return out[:T].reshape(T, N, V), *states


def _chunked_fwd(arguments: ChunkedArguments) -> tuple[Any, ChunkedArguments]:
    return chunked(arguments), arguments


def _chunked_bwd(arguments: ChunkedArguments, cotangents: Any) -> tuple[ChunkedArguments]:
    """Returns the cotangents of `chunked`'s arguments; see tpu_backward."""
    qkv, a, b, conv, a_log, dt_bias, _, conv_state, query_starts, query_lens, snapshots = arguments
    d_out, d_final_states, d_snapshots = cotangents
    T, N = a.shape
    *_, states = _forward(arguments, save_states=True)
    table = chunk_table(query_starts, query_lens, _padded_len(T))
    windows = tpu_chunked.chunk_windows(query_starts, query_lens, snapshots, _padded_len(T))
    rows = backward.chunk_rows(table, T)
    position = tpu_backward.positions(table, rows, T)
    project = functools.partial(tpu_backward.project, query_starts=query_starts, query_lens=query_lens, position=position)
    (projected, g, beta), pull = jax.vjp(project, qkv, a, b, conv, a_log, dt_bias, conv_state)
    projected, gates, d_out = (
        backward.to_chunks(x, rows) for x in (projected.astype(qkv.dtype), _gate_inputs(g, beta), d_out.reshape(T, -1))
    )
    d_snapshots = jnp.pad(d_snapshots, ((0, 1), (0, 0), (0, 0), (0, 0)))  # kernels do not accept empty arrays
    *d_projected, d_recurrent_state = tpu_backward.backward(
        projected, gates, states, d_out, d_final_states, d_snapshots, windows, _heads_per_step(N)
    )
    *grads, d_conv_state = pull(tuple(backward.to_tokens(x, rows, T).astype(jnp.float32) for x in d_projected))
    return (ChunkedArguments(*grads, d_recurrent_state, d_conv_state, None, None, None),)


chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _padded_len(T: int) -> int:
    """Returns the padded number of tokens, from which the kernels can cut windows."""
    return max(tpu_chunked.WINDOW, -(-T // tpu_chunked.TILE) * tpu_chunked.TILE)


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
    recurrent_state: Float32[Array, "S N V K"],
    conv_state: Float[Array, "S history C"],
    slots: Int32[Array, " B"],
    keep: Int32[Array, " B"],
) -> tuple[Float[Array, "B T N V"], Float32[Array, "S N V K"], Float[Array, "S history C"]]:
    """Computes `api.recurrent`."""
    norm = norm.astype(jnp.float32)[None]
    layer = _layer_rows(conv, a_log, dt_bias)
    return tpu_recurrent.step(qkv, _gate_inputs(a, b), z, layer, norm, eps, recurrent_state, conv_state, slots, keep)


def _heads_per_step(N: int) -> int:
    """Returns the heads of one grid step: the most that divide N, up to the tuned number.

    More heads hide the matrix unit's latency. On v5e the forward kernel takes 898, 709 and 641 bundles per
    head and chunk at 4, 8 and 16 heads; the backward kernel takes 1,058, 867 and 806. On v5p they take 936
    and 713, 1,106 and 877 at 4 and 8. With 16 heads, v5p's second core would have no work.
    """
    return max(heads for heads in range(1, tuned_config("tpu", "gated_delta").heads + 1) if N % heads == 0)


def _gate_inputs(a: Float[Array, "*tokens N"], b: Float[Array, "*tokens N"]) -> Float32[Array, "*tokens lanes"]:
    """Returns `a` and `b` side by side in rows of 128 lanes. Shorter rows would occupy 128 lanes anyway."""
    both = jnp.concatenate([a.astype(jnp.float32), b.astype(jnp.float32)], axis=-1)
    return jnp.pad(both, [(0, 0)] * (both.ndim - 1) + [(0, LANES - both.shape[-1])])


def _layer_rows(conv: Float[Array, "C W"], a_log: Float[Array, " N"], dt_bias: Float[Array, " N"]) -> LayerRows:
    rate, bias = (
        jnp.pad(x, (0, LANES - len(x)))[None] for x in (jnp.exp(a_log.astype(jnp.float32)), dt_bias.astype(jnp.float32))
    )
    return LayerRows(conv.astype(jnp.float32).T, rate, bias)
