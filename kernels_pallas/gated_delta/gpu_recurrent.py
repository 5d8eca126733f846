"""`recurrent` for Hopper: one kernel from the projections to the gated norm, the memory read and written once.

The work is bound by moving the memory: 128 KiB a head, both ways, for 100,000 multiplications. A block stays on its processor
and takes one head of one row after the other, whose value channels its warpgroups share. The copy engine brings the next
heads' memories while one is computed, and takes each away to where it came from; all else that a head needs is loaded while the
head before is computed. Where there are too few heads to fill the chip, the blocks of a cluster share one: what their value
channels have read, which the norm is over, they write into each other's shared memory.
Glossary: B rows, T tokens, N heads, K key width, V value width, W taps of the convolution, C channels; an item: a head of a row.
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
from kernels_pallas.gpu.export_cache import once
from kernels_pallas.gpu.mosaic import (
    PROCESSORS,
    arrive_cluster,
    barrier_of,
    clustered,
    everywhere,
    fence_cluster,
    load,
    meet,
    params,
    sigmoid,
    silu,
    softplus,
    store,
    tiles,
)
from kernels_pallas.tuning import chosen

SIDES = 3  # queries, keys and values
# A thread has one of 128 channels; or pairs of neighbouring keys of one value channel, 4 or 8 threads a channel.
CHANNELS = plgpu.Layout.TILED(plgpu.Tiling(((128,), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
MATRICES = {
    share: plgpu.Layout.TILED(plgpu.Tiling(tiling), warp_dims=(warp,), lane_dims=(-3, -2), vector_dim=-1)
    for share, tiling, warp in (
        (64, ((64, 8), (16, 8), (8, 8), (2,)), -7),
        (32, ((32, 8), (8, 8), (2,)), -5),
        (16, ((16, 16), (4, 16), (2,)), -5),
    )
}


@once
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
    cut = chosen("gpu", "gated_delta_recurrent", B * N)
    blocks = B * N if cut.parts > 1 else min(PROCESSORS, B * N)
    stages = min(cut.stages, -(-B * N // blocks))
    share = V // (cut.groups * cut.parts)
    memory, tail = jax.new_ref(memory), jax.new_ref(tail)
    kernel = plgpu.kernel(
        functools.partial(_kernel, eps=eps, blocks=blocks, stages=stages, groups=cut.groups, parts=cut.parts),
        out_type=jax.ShapeDtypeStruct(z.shape, z.dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=cut.groups,
        thread_name="group",
        scratch_types=[
            tiles(cut.groups * stages, share, K, dtype=jnp.float32),
            plgpu.SMEM((T, SIDES, K), jnp.float32),  # queries, keys and values after the convolution
            plgpu.SMEM((T, V), jnp.float32),  # what was read, for the norm over all of it
            plgpu.Barrier(num_barriers=cut.groups * stages),
            plgpu.Barrier(num_arrivals=cut.groups),
            barrier_of(cut.parts, cut.groups),
        ],
        compiler_params=params(approximate=False),
        kernel_name="gated_delta_recurrent",
        **clustered(cut.parts),
    )
    out = kernel(qkv, a, b, z, conv, a_log, dt_bias, norm, slots, keep, memory, tail)
    return out, jax.freeze(memory), jax.freeze(tail)


def _kernel(*refs, eps, blocks, stages, groups, parts):
    block = _Block(refs, eps, blocks, stages, groups, parts)
    ahead = max(stages - 1, 1)  # items whose memories are under way
    slots = [block.slot(n) for n in range(ahead)]
    fetched, inputs = jnp.int32(0), block.inputs(0)
    for n, slot in enumerate(slots):
        fetched = block.fetch(n, slot, fetched)
    inputs = inputs._replace(before=block.tails(0, slots[0]))

    def item(n, carry):
        used, fetched, inputs = carry
        following, later = block.inputs(n + 1), block.slot(n + ahead)
        following = following._replace(before=block.tails(n + 1, following.slot))
        block.step(n, inputs, used)
        plgpu.commit_smem_to_gmem_group()  # one an item, be it empty: so the last but one is the item before
        plgpu.wait_smem_to_gmem(min(stages - 1, 1), wait_read_only=True)
        return used + (inputs.slot >= 0).astype(jnp.int32), block.fetch(n + ahead, later, fetched), following

    if block.rounds > 1:
        lax.fori_loop(0, block.items, item, (jnp.int32(0), fetched, inputs))
    else:
        block.step(0, inputs, jnp.int32(0))
        plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)
    if parts > 1:
        meet(block.read)  # a block's shared memory must last until the others have written to it


class _Inputs(NamedTuple):
    """What an item needs besides its memory, in registers; lists by side (queries, keys, values) or by token.

    Attributes:
      slot, kept: where its memory is, and how many tokens it keeps.
      new, before, taps: inputs of the convolution, those before the first token, and its filters; all of 128 channels.
      gates, rates: `a` and `b` of each token; `a_log` and `dt_bias`.
      z: the output gates of the value channels.
    """

    slot: Any
    kept: Any
    new: Any
    before: Any
    taps: Any
    gates: Any
    rates: Any
    z: Any


class _Block:
    """A warpgroup's view of its block's work."""

    def __init__(self, refs, eps, blocks, stages, groups, parts):
        *inputs, self.memory, self.tail, self.out, self.state_s, self.qkv_s, self.out_s, self.ready, self.convolved, self.read = (
            refs
        )
        self.qkv, self.a, self.b, self.z, self.conv, self.a_log, self.dt_bias, norm, self.slots, self.keep = inputs
        self.eps, self.blocks, self.stages, self.parts = eps, blocks, stages, parts
        (B, self.T, self.N, self.V), self.K, self.W = self.z.shape, self.memory.shape[-1], self.conv.shape[1]
        self.block, self.group = lax.axis_index("block"), lax.axis_index("group")
        self.part = lax.axis_index("part") if parts > 1 else 0
        self.items = (B * self.N - self.block + blocks - 1) // blocks
        self.rounds = -(-B * self.N // blocks)
        self.share = self.V // (groups * parts)
        self.mine = pl.ds((self.part * groups + self.group) * self.share, self.share)
        self.matrix = MATRICES[self.share]
        self.row, self.column = self.matrix.reduce(1), self.matrix.reduce(0)
        # The sides that the warpgroup convolves; the last of two or four does one that is another's, or its own again.
        self.sides = {1: [0, 1, 2], 2: [self.group, 2], 4: [jnp.minimum(self.group, 2)]}[groups]
        self.owned = {1: [True, True, True], 2: [True, self.group == 0], 4: [self.group < SIDES]}[groups]
        self.weight = load(norm.at[self.mine], self.row)

    def place(self, n):
        """An item's row and head; of those past the end the last one's."""
        item = jnp.minimum(n, self.items - 1) * self.blocks + self.block
        return item // self.N, lax.rem(item, self.N)

    def slot(self, n):
        """Of an item's row."""
        return self.slots[self.place(n)[0]]

    def channels(self, side, head):
        """A head's queries, keys or values among all channels."""
        return pl.ds((side * self.N + head) * self.K, self.K)

    def inputs(self, n):
        """All that can be loaded before the slot's number is known."""
        (row, head), tokens = self.place(n), range(self.T)
        runs = [self.channels(side, head) for side in self.sides]
        return _Inputs(
            slot=self.slots[row],
            kept=self.keep[row],
            new=[[load(self.qkv.at[row, t, run], CHANNELS) for t in tokens] for run in runs],
            before=None,
            taps=[[load(self.conv.at[run, i], CHANNELS) for i in range(self.W)] for run in runs],
            gates=[(self.a[row, t, head], self.b[row, t, head]) for t in tokens],
            rates=(self.a_log[head], self.dt_bias[head]),
            z=[load(self.z.at[row, t, head, self.mine], self.row) for t in tokens],
        )

    def tails(self, n, slot):
        """The inputs before an item's first token."""
        own, head = jnp.maximum(slot, 0), self.place(n)[1]
        runs = [self.channels(side, head) for side in self.sides]
        return [[load(self.tail.at[own, i, run], CHANNELS) for i in range(self.W - 1)] for run in runs]

    def fetch(self, n, slot, count):
        """Sends for an item's memory, the `count`-th of the block, if it has one; how many that makes."""
        wanted = (n < self.items) & (slot >= 0)
        at = self.group * self.stages + lax.rem(count, self.stages)

        @pl.when(wanted)
        def _():
            source = self.memory.at[slot, self.place(n)[1], self.mine]
            plgpu.copy_gmem_to_smem(source, self.state_s.at[at], self.ready.at[at])

        return count + wanted.astype(jnp.int32)

    def step(self, n, inputs, used):
        """One item, whose memory is the `used`-th of the block."""
        row, head = self.place(n)

        @pl.when(inputs.slot < 0)
        def _rest():
            for t in range(self.T):
                store(self.out.at[row, t, head, self.mine], plgpu.layout_cast(jnp.zeros(self.share, self.out.dtype), self.row))

        @pl.when(inputs.slot >= 0)
        def _work():
            windows = [x + y for x, y in zip(inputs.before, inputs.new, strict=True)]
            self.convolve(windows, inputs.taps)
            fades, strengths = self.gates(inputs)
            meet(self.convolved)  # all have read the tail, too
            at = self.group * self.stages + lax.rem(used, self.stages)
            reads = self.remember(at, inputs.kept, fades, strengths)

            @pl.when(inputs.kept > 0)
            def _():
                destination = self.memory.at[inputs.slot, head, self.mine]
                plgpu.copy_smem_to_gmem(self.state_s.at[at], destination, commit_group=False)

            plgpu.barrier_wait(self.read)
            if self.parts > 1:
                fence_cluster()
            for t, (read, z) in enumerate(zip(reads, inputs.z, strict=True)):
                whole = self.along_columns(load(self.out_s.at[t], self.column))
                scale = lax.rsqrt(jnp.sum(whole * whole, axis=1) * (1 / self.V) + self.eps)
                normed = read * scale * self.weight.astype(jnp.float32) * silu(z.astype(jnp.float32))
                store(self.out.at[row, t, head, self.mine], normed.astype(self.out.dtype))
            for side, owned, window in zip(self.sides, self.owned, windows, strict=True):
                channels = self.tail.at[inputs.slot, :, self.channels(side, head)]
                _when(owned & (self.part == 0), functools.partial(self.keep_last, channels, window, inputs.kept))

    def convolve(self, windows, taps):
        """Convolution and SiLU of the warpgroup's sides, to shared memory."""
        for side, owned, window, filters in zip(self.sides, self.owned, windows, taps, strict=True):
            x, w = ([y.astype(jnp.float32) for y in ys] for ys in (window, filters))
            for t in range(self.T):
                value = silu(sum(x[t + i] * w[i] for i in range(self.W)))
                _when(owned, functools.partial(store, self.qkv_s.at[t, side], value))

    def gates(self, inputs):
        """Decay and writing strength of each token."""
        a_log, bias = (x.astype(jnp.float32) for x in inputs.rates)
        rate = jnp.exp(a_log)
        fades = [jnp.exp(-rate * softplus(a.astype(jnp.float32) + bias)) for a, _ in inputs.gates]
        return fades, [sigmoid(b.astype(jnp.float32)) for _, b in inputs.gates]

    def remember(self, at, kept, fades, strengths):
        """The rule, token by token: what is read, also for the others; the memory to keep goes back to its place in the ring."""
        plgpu.barrier_wait(self.ready.at[at])
        state, reads = load(self.state_s.at[at], self.matrix), []
        for t, (fade, strength) in enumerate(zip(fades, strengths, strict=True)):
            k, q = (self.along_columns(load(self.qkv_s.at[t, side], self.column)) for side in (1, 0))
            scale = lax.rsqrt(jnp.sum(k * k, axis=1) + L2_EPS)
            state = state * fade
            error = load(self.qkv_s.at[t, 2, self.mine], self.row) - jnp.sum(state * k, axis=1) * scale
            state = state + self.along_rows(error * scale * strength) * k
            _when(kept == t + 1 if self.T > 1 else True, functools.partial(store, self.state_s.at[at], state))
            scale = lax.rsqrt(jnp.sum(q * q, axis=1) + L2_EPS) * self.K**-0.5
            reads.append(jnp.sum(state * q, axis=1) * scale)
            for place in everywhere(self.out_s.at[t, self.mine], self.parts):
                store(place, reads[-1])
        if self.parts > 1:
            arrive_cluster(self.read)
        else:
            plgpu.barrier_arrive(self.read)
            plgpu.commit_smem()
        return reads

    def keep_last(self, tail, window, kept):
        """Writes the last inputs of the tokens that are remembered."""
        for i in range(self.W - 1):
            newest = window[i]
            for t in range(1, self.T + 1):
                newest = jnp.where(kept == t, window[t + i], newest)
            store(tail.at[i], newest)

    def along_columns(self, x):
        """Of keys or queries, the same for every value channel."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (self.share, self.K), [1]), self.matrix)

    def along_rows(self, x):
        """Of value channels, the same for every key."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (self.share, self.K), [0]), self.matrix)


def _when(condition, do):
    """`do()` where the condition holds, which may be known beforehand."""
    if condition is True:
        do()
    else:
        pl.when(condition)(do)
