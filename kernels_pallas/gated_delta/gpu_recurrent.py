"""`recurrent` for Hopper: one kernel from the projections to the gated norm, the memory read and written once.

Two warpgroups work on one head of one row; each keeps half of the memory (64 value channels x K keys, float32) in registers. The
work is bound by moving the memory: 128 KiB a head for some 100,000 multiplications. Two heads share a block, which so has 512
CUDA threads: that makes the compiler do with 128 registers a thread, where it would take 140 and leave half of a processor empty.
Glossary: T tokens, N heads, K key width, V value width, W taps of the convolution.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.gated_delta.reference import L2_EPS
from kernels_pallas.mosaic import COL, MATRIX, ROW, along_columns, along_rows, load, meet, params, sigmoid, silu, softplus, store

HALVES = 2  # warpgroups of a head, each with its share of the value channels
PAIR = 2  # heads of a block, if there are more heads in all than
ALONE = 132  # processors of a chip, where one each is faster: 7.7 us for 8 rows, 11.4 in pairs


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
    """As `api.recurrent`."""
    (B, T, N, V), K = z.shape, memory.shape[-1]
    pair = PAIR if B * N > ALONE else 1
    memory, tail = jax.new_ref(memory), jax.new_ref(tail)
    kernel = plgpu.kernel(
        functools.partial(_kernel, pair=pair, T=T, N=N, V=V, K=K, W=conv.shape[1], eps=eps),
        out_type=jax.ShapeDtypeStruct(z.shape, z.dtype),
        grid=(B, N // pair),
        grid_names=("row", "block"),
        num_threads=pair * HALVES,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((pair, T, 2, K), jnp.float32),  # queries and keys after the convolution
            plgpu.SMEM((pair, T, V), jnp.float32),  # what was read, for the norm over both halves
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=pair),
        ],
        compiler_params=params(approximate=False),
        kernel_name="gated_delta_recurrent",
    )
    out = kernel(qkv, a, b, z, conv, a_log, dt_bias, norm, slots, keep, memory, tail)
    return out, jax.freeze(memory), jax.freeze(tail)


def _kernel(*refs, pair, T, N, V, K, W, eps):
    qkv, a, b, z, conv, a_log, dt_bias, norm, slots, keep, memory, tail, out, *scratch = refs
    row, block, thread = (lax.axis_index(name) for name in ("row", "block", "group"))
    member, half, share = thread // HALVES, thread % HALVES, V // HALVES
    head, slot, kept, mine = block * pair + member, slots[row], keep[row], pl.ds(half * share, share)
    qk_s, out_s, barrier = (ref.at[member] for ref in scratch)

    @pl.when(slot < 0)
    def _idle():
        for t in range(T):
            store(out.at[row, t, head, mine], plgpu.layout_cast(jnp.zeros(share, out.dtype), ROW))

    @pl.when(slot >= 0)
    def _active():
        state = load(memory.at[slot, head, mine], MATRIX)  # under way while the convolution is computed
        # The first half convolves the queries and the second the keys, each its own values besides.
        sides = [
            _Channels((half * N + head) * K, K),
            _Channels(2 * N * K + head * V + half * share, share),
        ]
        windows = [side.window(qkv, tail, row, slot, T, W) for side in sides]
        (qk, v) = (side.convolve(window, conv, T, W) for side, window in zip(sides, windows, strict=True))
        for t in range(T):
            qk_s[t, half] = qk[t]
        meet(barrier)  # both have read the tail, too
        for side, window in zip(sides, windows, strict=True):
            side.keep(window, tail, slot, kept, T, W)

        rate, bias = jnp.exp(a_log[head].astype(jnp.float32)), dt_bias[head].astype(jnp.float32)
        reads = []
        for t in range(T):
            fade = jnp.exp(-rate * softplus(a[row, t, head].astype(jnp.float32) + bias))
            beta = sigmoid(b[row, t, head].astype(jnp.float32))
            state = _write(state * fade, along_columns(load(qk_s.at[t, 1], COL), share), v[t], beta)

            @pl.when(kept == t + 1)
            def _remember(state=state):
                memory[slot, head, mine] = state

            # Loaded only now: with keys and queries in registers together, one block fits where now two do.
            read = _read(state, along_columns(load(qk_s.at[t, 0], COL), share))
            out_s[t, mine] = read
            reads.append(read)

        meet(barrier)
        weight = load(norm.at[mine]).astype(jnp.float32)
        for t in range(T):
            whole = along_columns(load(out_s.at[t], COL), share)
            scale = lax.rsqrt(jnp.sum(whole * whole, axis=1) * (1 / V) + eps)
            gate = silu(load(z.at[row, t, head, mine]).astype(jnp.float32))
            store(out.at[row, t, head, mine], (reads[t] * scale * weight * gate).astype(out.dtype))


def _write(state, k, v, beta):
    """`S + beta (v - S k) k^T`, for a key that comes with its length."""
    scale = lax.rsqrt(jnp.sum(k * k, axis=1) + L2_EPS)
    error = v - jnp.sum(state * k, axis=1) * scale
    return state + along_rows(error * scale * beta, k.shape[1]) * k


def _read(state, q):
    """`S q`, for a query that comes with its length; scaled by K^-1/2."""
    return jnp.sum(state * q, axis=1) * lax.rsqrt(jnp.sum(q * q, axis=1) + L2_EPS) * q.shape[1] ** -0.5


class _Channels:
    """A run of channels on its way through the convolution, as ROW vectors."""

    def __init__(self, first, size):
        self.run = pl.ds(first, size)

    def window(self, qkv, tail, row, slot, T, W):
        """The inputs before the first token, then the tokens."""
        return [load(tail.at[slot, i, self.run]) for i in range(W - 1)] + [load(qkv.at[row, t, self.run]) for t in range(T)]

    def convolve(self, window, conv, T, W):
        """The activated outputs, float32."""
        taps = [load(conv.at[self.run, i]).astype(jnp.float32) for i in range(W)]
        inputs = [x.astype(jnp.float32) for x in window]
        return [silu(sum(inputs[t + i] * taps[i] for i in range(W))) for t in range(T)]

    def keep(self, window, tail, slot, kept, T, W):
        """Writes the last inputs of the tokens that are remembered."""
        for i in range(W - 1):
            newest = window[i]
            for t in range(1, T + 1):
                newest = jnp.where(kept == t, window[t + i], newest)
            store(tail.at[slot, i, self.run], newest)
