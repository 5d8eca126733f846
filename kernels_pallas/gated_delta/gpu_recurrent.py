"""`recurrent` for Hopper: one kernel from the projections to the gated norm.

The work is bound by moving the state, which is read and written once: 128 KiB per head, both ways, for
100,000 multiplications. A persistent block handles one item (a head of a row) after the other. Its warpgroups
share the item's value channels. The copy engine fetches the states of the next items while one is computed,
and writes each state back in place. All other inputs of an item are loaded while the item before it is
computed. Where there are too few heads to fill the chip, the blocks of a cluster share one. The output norm
is over all value channels, so the blocks write their reads into each other's shared memory.
Glossary: B rows, T tokens, N heads, K key width, V value width, W taps of the convolution, C channels; an
item: a head of a row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.gated_delta.reference import L2_EPS
from kernels_pallas.gpu.export_cache import exported_once
from kernels_pallas.gpu.mosaic import (
    arrive_cluster,
    barrier_of,
    barrier_sync,
    cluster_refs,
    clustered,
    fence_cluster,
    load,
    num_sms,
    params,
    sigmoid,
    silu,
    softplus,
    store,
    tiles,
)
from kernels_pallas.tuning import tuned_config

STREAMS = 3  # queries, keys and values
# CHANNELS: a thread holds one of 128 channels. MATRICES: it holds pairs of neighbouring keys of one value
# channel, and 4 or 8 threads share a channel.
CHANNELS = plgpu.Layout.TILED(plgpu.Tiling(((128,), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
MATRICES = {
    share: plgpu.Layout.TILED(plgpu.Tiling(tiling), warp_dims=(warp,), lane_dims=(-3, -2), vector_dim=-1)
    for share, tiling, warp in (
        (64, ((64, 8), (16, 8), (8, 8), (2,)), -7),
        (32, ((32, 8), (8, 8), (2,)), -5),
        (16, ((16, 16), (4, 16), (2,)), -5),
    )
}


@exported_once
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
    (B, T, N, V), K = z.shape, recurrent_state.shape[-1]
    config = tuned_config("hopper", "gated_delta_recurrent", B * N)
    blocks = B * N if config.parts > 1 else min(num_sms(), B * N)
    stages = min(config.stages, -(-B * N // blocks))
    share = V // (config.groups * config.parts)
    recurrent_state, conv_state = jax.new_ref(recurrent_state), jax.new_ref(conv_state)
    kernel = plgpu.kernel(
        functools.partial(_kernel, eps=eps, blocks=blocks, stages=stages, groups=config.groups, parts=config.parts),
        out_type=jax.ShapeDtypeStruct(z.shape, z.dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=config.groups,
        thread_name="group",
        scratch_types=[
            tiles(config.groups * stages, share, K, dtype=jnp.float32),
            plgpu.SMEM((T, STREAMS, K), jnp.float32),  # queries, keys and values after the convolution
            plgpu.SMEM((T, V), jnp.float32),  # all reads of a head, for its norm
            plgpu.Barrier(num_barriers=config.groups * stages),
            plgpu.Barrier(num_arrivals=config.groups),
            barrier_of(config.parts, config.groups),
        ],
        compiler_params=params(approximate=False),
        kernel_name="gated_delta_recurrent",
        **clustered(config.parts),
    )
    out = kernel(qkv, a, b, z, conv, a_log, dt_bias, norm, slots, keep, recurrent_state, conv_state)
    return out, jax.freeze(recurrent_state), jax.freeze(conv_state)


def _kernel(*refs, eps, blocks, stages, groups, parts):
    block = _Warpgroup(refs, eps, blocks, stages, groups, parts)
    prefetched = max(stages - 1, 1)  # items whose states are being copied
    slots = [block.slot(n) for n in range(prefetched)]
    fetched, inputs = jnp.int32(0), block.load_inputs(0)
    for n, slot in enumerate(slots):
        fetched = block.fetch_state(n, slot, fetched)
    inputs = inputs._replace(history=block.load_history(0, slots[0]))

    def item(n, carry):
        used, fetched, inputs = carry
        next_inputs, next_slot = block.load_inputs(n + 1), block.slot(n + prefetched)
        next_inputs = next_inputs._replace(history=block.load_history(n + 1, next_inputs.slot))
        block.step(n, inputs, used)
        plgpu.commit_smem_to_gmem_group()  # one group per item, even if empty, so that waiting counts items
        plgpu.wait_smem_to_gmem(min(stages - 1, 1), wait_read_only=True)
        return used + (inputs.slot >= 0).astype(jnp.int32), block.fetch_state(n + prefetched, next_slot, fetched), next_inputs

    if block.rounds > 1:
        lax.fori_loop(0, block.items, item, (jnp.int32(0), fetched, inputs))
    else:
        block.step(0, inputs, jnp.int32(0))
        plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)
    if parts > 1:
        barrier_sync(block.read)  # other blocks of the cluster may still write to this block's shared memory


class _Inputs(NamedTuple):
    """Inputs of an item except its state, in registers; lists by stream (queries, keys, values) or by token.

    Attributes:
      slot: slot of its state, or -1.
      num_kept: number of tokens to keep.
      qkv, history, filters: the convolution's new inputs, earlier inputs and filters, 128 channels each.
      gates: `a` and `b` of each token.
      gate_params: `a_log` and `dt_bias`.
      z: output gates of the value channels.
    """

    slot: Any
    num_kept: Any
    qkv: Any
    history: Any
    filters: Any
    gates: Any
    gate_params: Any
    z: Any


class _Warpgroup:
    """One warpgroup's share of its block's work."""

    def __init__(self, refs, eps, blocks, stages, groups, parts):
        (
            *inputs,
            self.recurrent_state,
            self.conv_state,
            self.out,
            self.state_s,
            self.qkv_s,
            self.out_s,
            self.ready,
            self.convolved,
            self.read,
        ) = refs
        self.qkv, self.a, self.b, self.z, self.conv, self.a_log, self.dt_bias, norm, self.slots, self.keep = inputs
        self.eps, self.blocks, self.stages, self.parts = eps, blocks, stages, parts
        (B, self.T, self.N, self.V), self.K, self.W = self.z.shape, self.recurrent_state.shape[-1], self.conv.shape[1]
        self.block, self.group = lax.axis_index("block"), lax.axis_index("group")
        self.part = lax.axis_index("part") if parts > 1 else 0
        self.items = (B * self.N - self.block + blocks - 1) // blocks
        self.rounds = -(-B * self.N // blocks)
        self.share = self.V // (groups * parts)
        self.own_channels = pl.ds((self.part * groups + self.group) * self.share, self.share)
        self.matrix_layout = MATRICES[self.share]
        self.row_layout, self.column_layout = self.matrix_layout.reduce(1), self.matrix_layout.reduce(0)
        # Streams to convolve. With 2 or 4 warpgroups, one of them repeats a stream without storing it.
        self.streams = {1: [0, 1, 2], 2: [self.group, 2], 4: [jnp.minimum(self.group, 2)]}[groups]
        self.is_owner = {1: [True, True, True], 2: [True, self.group == 0], 4: [self.group < STREAMS]}[groups]
        self.weight = load(norm.at[self.own_channels], self.row_layout)

    def row_and_head(self, n):
        """Returns an item's row and head; past the end, the last item's."""
        item = jnp.minimum(n, self.items - 1) * self.blocks + self.block
        return item // self.N, lax.rem(item, self.N)

    def slot(self, n):
        """Returns the slot of an item's row."""
        return self.slots[self.row_and_head(n)[0]]

    def channels(self, stream, head):
        """Returns the slice of one head's queries, keys or values among all channels."""
        return pl.ds((stream * self.N + head) * self.K, self.K)

    def load_inputs(self, n):
        """Loads all inputs that do not depend on the slot."""
        (row, head), tokens = self.row_and_head(n), range(self.T)
        channel_slices = [self.channels(stream, head) for stream in self.streams]
        return _Inputs(
            slot=self.slots[row],
            num_kept=self.keep[row],
            qkv=[[load(self.qkv.at[row, t, channels], CHANNELS) for t in tokens] for channels in channel_slices],
            history=None,
            filters=[[load(self.conv.at[channels, i], CHANNELS) for i in range(self.W)] for channels in channel_slices],
            gates=[(self.a[row, t, head], self.b[row, t, head]) for t in tokens],
            gate_params=(self.a_log[head], self.dt_bias[head]),
            z=[load(self.z.at[row, t, head, self.own_channels], self.row_layout) for t in tokens],
        )

    def load_history(self, n, slot):
        """Loads the convolution's inputs before an item's first token."""
        own, head = jnp.maximum(slot, 0), self.row_and_head(n)[1]
        channel_slices = [self.channels(stream, head) for stream in self.streams]
        return [[load(self.conv_state.at[own, i, channels], CHANNELS) for i in range(self.W - 1)] for channels in channel_slices]

    def fetch_state(self, n, slot, count):
        """Starts the copy of an item's state, the block's `count`-th, if the item has one.

        Returns the number of states fetched so far.
        """
        wanted = (n < self.items) & (slot >= 0)
        at = self.group * self.stages + lax.rem(count, self.stages)

        @pl.when(wanted)
        def _():
            source = self.recurrent_state.at[slot, self.row_and_head(n)[1], self.own_channels]
            plgpu.copy_gmem_to_smem(source, self.state_s.at[at], self.ready.at[at])

        return count + wanted.astype(jnp.int32)

    def step(self, n, inputs, used):
        """Computes one item, whose state is the block's `used`-th."""
        row, head = self.row_and_head(n)

        @pl.when(inputs.slot < 0)
        def _rest():
            for t in range(self.T):
                store(
                    self.out.at[row, t, head, self.own_channels],
                    plgpu.layout_cast(jnp.zeros(self.share, self.out.dtype), self.row_layout),
                )

        @pl.when(inputs.slot >= 0)
        def _work():
            windows = [x + y for x, y in zip(inputs.history, inputs.qkv, strict=True)]
            self.convolve(windows, inputs.filters)
            fades, strengths = self.gates(inputs)
            barrier_sync(self.convolved)  # every warpgroup has read the conv state, too
            at = self.group * self.stages + lax.rem(used, self.stages)
            reads = self.update_state(at, inputs.num_kept, fades, strengths)

            @pl.when(inputs.num_kept > 0)
            def _():
                destination = self.recurrent_state.at[inputs.slot, head, self.own_channels]
                plgpu.copy_smem_to_gmem(self.state_s.at[at], destination, commit_group=False)

            plgpu.barrier_wait(self.read)
            if self.parts > 1:
                fence_cluster()
            for t, (read, z) in enumerate(zip(reads, inputs.z, strict=True)):
                all_read = self.along_columns(load(self.out_s.at[t], self.column_layout))
                scale = lax.rsqrt(jnp.sum(all_read * all_read, axis=1) * (1 / self.V) + self.eps)
                normed = read * scale * self.weight.astype(jnp.float32) * silu(z.astype(jnp.float32))
                store(self.out.at[row, t, head, self.own_channels], normed.astype(self.out.dtype))
            for stream, owner, window in zip(self.streams, self.is_owner, windows, strict=True):
                own_conv_state = self.conv_state.at[inputs.slot, :, self.channels(stream, head)]
                _when(owner & (self.part == 0), functools.partial(self.store_conv_state, own_conv_state, window, inputs.num_kept))

    def convolve(self, windows, filters):
        """Applies convolution and SiLU to the warpgroup's streams and stores them in shared memory."""
        for stream, owner, window, taps in zip(self.streams, self.is_owner, windows, filters, strict=True):
            x, w = ([y.astype(jnp.float32) for y in ys] for ys in (window, taps))
            for t in range(self.T):
                value = silu(sum(x[t + i] * w[i] for i in range(self.W)))
                _when(owner, functools.partial(store, self.qkv_s.at[t, stream], value))

    def gates(self, inputs):
        """Returns decay and writing strength of each token."""
        a_log, bias = (x.astype(jnp.float32) for x in inputs.gate_params)
        rate = jnp.exp(a_log)
        fades = [jnp.exp(-rate * softplus(a.astype(jnp.float32) + bias)) for a, _ in inputs.gates]
        return fades, [sigmoid(b.astype(jnp.float32)) for _, b in inputs.gates]

    def update_state(self, at, num_kept, fades, strengths):
        """Applies the rule token by token.

        Returns the reads, and shares them with the other warpgroups. The state to keep is stored in its ring
        buffer.
        """
        plgpu.barrier_wait(self.ready.at[at])
        state, reads = load(self.state_s.at[at], self.matrix_layout), []
        for t, (fade, strength) in enumerate(zip(fades, strengths, strict=True)):
            k, q = (self.along_columns(load(self.qkv_s.at[t, stream], self.column_layout)) for stream in (1, 0))
            scale = lax.rsqrt(jnp.sum(k * k, axis=1) + L2_EPS)
            state = state * fade
            error = load(self.qkv_s.at[t, 2, self.own_channels], self.row_layout) - jnp.sum(state * k, axis=1) * scale
            state = state + self.along_rows(error * scale * strength) * k
            _when(num_kept == t + 1 if self.T > 1 else True, functools.partial(store, self.state_s.at[at], state))
            scale = lax.rsqrt(jnp.sum(q * q, axis=1) + L2_EPS) * self.K**-0.5
            reads.append(jnp.sum(state * q, axis=1) * scale)
            for buffer in cluster_refs(self.out_s.at[t, self.own_channels], self.parts):
                store(buffer, reads[-1])
        if self.parts > 1:
            arrive_cluster(self.read)
        else:
            plgpu.barrier_arrive(self.read)
            plgpu.commit_smem()
        return reads

    def store_conv_state(self, conv_state, window, num_kept):
        """Stores the last inputs of the tokens that are kept."""
        for i in range(self.W - 1):
            newest = window[i]
            for t in range(1, self.T + 1):
                newest = jnp.where(num_kept == t, window[t + i], newest)
            store(conv_state.at[i], newest)

    def along_columns(self, x):
        """Broadcasts keys or queries over the value channels."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (self.share, self.K), [1]), self.matrix_layout)

    def along_rows(self, x):
        """Broadcasts value channels over the keys."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (self.share, self.K), [0]), self.matrix_layout)


def _when(condition, body):
    """Runs `body()` where the condition holds. A condition of True is resolved while tracing."""
    if condition is True:
        body()
    else:
        pl.when(condition)(body)
