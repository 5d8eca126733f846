"""What the TPU attention kernels share: keys stream through two buffers on chip while the softmax is kept up to date.

A kernel's grid walks through blocks of rows, dealt out to the chip's cores; each block visits those rows of other arrays that it
needs, a window at a time. The copy of the next window is under way while the present one is computed, across blocks too: a
block's last visit fetches the next block's first.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.lax import Precision

LANES = 128  # of a vector register
CORES = 2  # of a v5p; a chip of one core walks through the one's blocks, then through the other's
LOG2_E = math.log2(math.e)
NEG_INF = -1e30  # the largest score before any was seen: finite, so that no difference of two is NaN


def dot(equation, x, y):
    """A product in float32 of operands of one dtype; float32 operands in full precision (six passes)."""
    precision = Precision.HIGHEST if x.dtype == jnp.float32 else Precision.DEFAULT
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def grid(blocks: int) -> tuple[int, int]:
    """Cores and steps for so many blocks: core c has the blocks c, c + cores, ..."""
    cores = min(CORES, blocks)
    return cores, pl.cdiv(blocks, cores)


def block_index(core, step, blocks: int):
    """The block that a step holds, for index maps. Where none is left it holds on to the one before, and writes nothing."""
    cores, _ = grid(blocks)
    block = step * cores + core
    return jnp.where(block < blocks, block, block - cores)


def visit_all(step, visits, next_visits, fetch: Callable, compute: Callable, slot_ref) -> None:
    """Runs `compute(visit, slot)` over a block's visits, each with its window in buffer `slot`.

    Args:
      step: the block's number on this core.
      visits, next_visits: of this block and the one after it; 0 is allowed.
      fetch: `fetch(ahead, visit, slot, action)` starts or waits for (`action` "start" or "wait") the copies of a visit of this
        block (ahead 0) or the next (ahead 1).
      slot_ref: one int32 in SMEM, the buffer of this block's first visit; kept from block to block.
    """

    @pl.when(step == 0)
    def _():
        slot_ref[0] = 0

        @pl.when(visits > 0)
        def _():
            fetch(0, 0, 0, "start")

    slot = slot_ref[0]

    @pl.when((visits == 0) & (next_visits > 0))
    def _():
        fetch(1, 0, slot, "start")

    def visit(i, slot):
        @pl.when(i + 1 < visits)
        def _():
            fetch(0, i + 1, 1 - slot, "start")

        @pl.when((i + 1 == visits) & (next_visits > 0))
        def _():
            fetch(1, 0, 1 - slot, "start")

        fetch(0, i, slot, "wait")
        compute(i, slot)
        return 1 - slot

    slot_ref[0] = jax.lax.fori_loop(0, visits, visit, slot)


class SoftmaxUpdate(NamedTuple):
    """One softmax and more keys for it.

    Attributes:
      scores: [rows, keys] float32, times log2(e): the chip's exponential is one of 2. -inf where a row does not see a key.
      values: [keys, width].
      total: [rows, width] float32 reference, the weighted sum of the values so far.
      largest, weight: [rows, lanes] float32 references, the largest score and the sum of the weights so far, in every lane.
    """

    scores: jax.Array
    values: jax.Array
    total: Any
    largest: Any
    weight: Any


def update_softmaxes(softmaxes: Sequence[SoftmaxUpdate]) -> None:
    """Adds keys to independent softmaxes (arXiv:2205.14135), step by step for all of them.

    A step of one hides the latency of the others': on a v5e 128 rows of 72 and 1,104 keys take 910 bundles a head alone, and
    630 four together.
    """
    before = [x.largest[...] for x in softmaxes]
    largest = [jnp.maximum(b, jnp.max(x.scores, axis=1, keepdims=True)) for x, b in zip(softmaxes, before, strict=True)]
    fade = [jnp.exp2(b - m) for b, m in zip(before, largest, strict=True)]
    weights = [jnp.exp2(x.scores - m[:, :1]) for x, m in zip(softmaxes, largest, strict=True)]
    mixed = [dot("qk,kh->qh", w.astype(x.values.dtype), x.values) for x, w in zip(softmaxes, weights, strict=True)]
    for x, m, f, w, new in zip(softmaxes, largest, fade, weights, mixed, strict=True):
        x.largest[...] = m
        x.weight[...] = x.weight[...] * f + jnp.sum(w, axis=1, keepdims=True)
        x.total[...] = x.total[...] * f[:, :1] + new
