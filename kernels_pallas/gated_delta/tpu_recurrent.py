"""`recurrent` on TPU, from the projections to the normed output; each grid step handles one batch row.

A row's slot of the recurrent state is N x V x K float32, 1 MiB in this model. It is fetched while the row
before it is computed, and written back in place. A row without a slot moves no state: its step keeps the
previous row's block.
Glossary: B rows, S slots, T tokens, N heads, K key width, V value width, C channels, W conv width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.gated_delta.tpu_math import LANES, LayerRows, dot, normalised, softplus


def block_slots(slots: Int32[Array, " B"]) -> Int32[Array, " B"]:
    """Returns the slot whose block each grid step holds.

    It is the row's own slot. A row without a slot takes the slot of the last earlier row that has one. If no
    earlier row has one, it takes the slot of the first row that has one, else 0.
    """
    row = jnp.arange(slots.shape[0], dtype=jnp.int32)
    last = jax.lax.cummax(jnp.where(slots >= 0, row, -1))
    return jnp.maximum(slots[jnp.where(last >= 0, last, jnp.argmax(slots >= 0))], 0)


def step(
    qkv: Float[Array, "B T C"],
    gate_inputs: Float32[Array, "B T lanes"],
    z: Float[Array, "B T N V"],
    layer: LayerRows,
    norm: Float32[Array, "1 V"],
    eps: float,
    recurrent_state: Float32[Array, "S N V K"],
    conv_state: Float[Array, "S history C"],
    slots: Int32[Array, " B"],
    keep: Int32[Array, " B"],
) -> tuple[Float[Array, "B T N V"], Float32[Array, "S N V K"], Float[Array, "S history C"]]:
    """Runs the kernel over all rows. The gate inputs are as in tpu_chunked.forward."""

    def row(x):
        return pl.BlockSpec((1, *x.shape[1:]), lambda b, *_: (b, *[0] * (x.ndim - 1)))

    def slot(x):
        return pl.BlockSpec((1, *x.shape[1:]), lambda b, held, *_: (held[b], *[0] * (x.ndim - 1)))

    def whole(x):
        return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)

    (B, T, C), (conv, rate, bias) = qkv.shape, layer
    scalars = (block_slots(slots), slots, keep)
    constants, state = (conv.reshape(-1, C // LANES, LANES), rate, bias, norm), (recurrent_state, conv_state)
    before = len(scalars) + 3 + len(constants)
    return pl.pallas_call(
        functools.partial(_kernel, eps=eps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B,),
            in_specs=[row(qkv), row(gate_inputs), row(z), *map(whole, constants), *map(slot, state)],
            out_specs=[row(z), *map(slot, state)],
            scratch_shapes=[pltpu.VMEM((C // LANES, conv_state.shape[1] + T, LANES), jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (z, recurrent_state, conv_state)],
        input_output_aliases={before: 1, before + 1: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="gated_delta_recurrent",
    )(*scalars, qkv, gate_inputs, z, *constants, *state)


def _kernel(
    _,
    slots,
    keep,
    qkv_ref,
    gate_ref,
    z_ref,
    conv_ref,
    rate_ref,
    bias_ref,
    norm_ref,
    state_ref,
    conv_state_ref,
    out_ref,
    new_state_ref,
    new_conv_state_ref,
    window_ref,
    *,
    eps,
):
    row = pl.program_id(0)
    active = slots[row] >= 0

    @pl.when(~active)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(~active & (row == 0))
    def _():  # written back if no row has a slot; else the first row that has one overwrites it
        new_state_ref[...] = state_ref[...]
        new_conv_state_ref[...] = conv_state_ref[...]

    @pl.when(active)
    def _():
        T, N, _ = z_ref.shape[1:]
        _shift_in(qkv_ref, conv_state_ref, window_ref, new_conv_state_ref, keep[row])
        x = gate_ref[0]
        decay = jnp.exp(-rate_ref[...] * softplus(x + bias_ref[...]))[:, :N].T
        beta = jax.lax.logistic(x)[:, N : 2 * N].T
        tokens = [_project(window_ref, conv_ref, t, N) for t in range(T)]
        for t, read in enumerate(_recur(tokens, decay, beta, keep[row], state_ref, new_state_ref)):
            y = read * jax.lax.rsqrt(jnp.mean(read * read, axis=-1, keepdims=True) + eps)
            z = z_ref[0, t].astype(jnp.float32)
            out_ref[0, t] = (y * norm_ref[...] * z * jax.lax.logistic(z)).astype(out_ref.dtype)


def _shift_in(qkv_ref, conv_state_ref, window_ref, new_conv_state_ref, keep):
    """Copies the conv state and the tokens into scratch, [C / lanes, W - 1 + T, lanes].

    Also writes the conv state after `keep` tokens.
    """
    inputs = conv_state_ref.shape[1]
    for j in range(window_ref.shape[0]):
        lanes = slice(j * LANES, (j + 1) * LANES)
        window_ref[j, :inputs] = conv_state_ref[0, :, lanes].astype(jnp.float32)
        window_ref[j, inputs:] = qkv_ref[0, :, lanes].astype(jnp.float32)
        new_conv_state_ref[0, :, lanes] = window_ref[j, pl.ds(keep, inputs)].astype(new_conv_state_ref.dtype)


def _project(window_ref, conv_ref, t, N):
    """Convolves, activates and normalises one token. Returns queries, keys and values, [N, lanes] each."""
    x = sum(window_ref[:, t + i] * conv_ref[i] for i in range(conv_ref.shape[0]))
    q, k, v = jnp.split(x * jax.lax.logistic(x), [N, 2 * N])
    return normalised(q) * LANES**-0.5, normalised(k), v


def _recur(tokens, decay, beta, keep, state_ref, new_state_ref):
    """Returns each token's read, [N, V], and writes the state after `keep` tokens.

    Args:
      tokens: (q, k, v) of each token, [N, lanes] each.
      decay, beta: [N, T].

    A head's state, [V, K], is loaded and stored once. The matrix unit reads it, which gives rows: 2,616
    bundles per batch row on v5e and 2,631 on v5p. Sums over lanes take 3,150 and 3,336 there. On v6e the
    matrix unit takes 3,434 and sums take 2,844.
    """
    N, T = decay.shape
    reads = [[] for _ in range(T)]
    for n in range(N):
        state = kept_state = state_ref[0, n]
        for t, token in enumerate(tokens):
            q, k, v = (x[n : n + 1] for x in token)
            fade, strength = (x[n : n + 1, t : t + 1] for x in (decay, beta))
            by_key, by_query = jnp.split(dot("ik,vk->iv", jnp.concatenate([k, q]), state, jnp.float32), 2)
            new = strength * (v - fade * by_key)
            reads[t].append(fade * by_query + new * jnp.sum(k * q, axis=1, keepdims=True))
            state = state * fade + jnp.broadcast_to(new, state.shape).T * k
            kept_state = jnp.where(t < keep, state, kept_state)
        new_state_ref[0, n] = kept_state
    return [jnp.concatenate(rows) for rows in reads]
