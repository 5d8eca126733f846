"""Parts that the TPU attention kernels share: double-buffered fetches and the online softmax.

A kernel's grid visits blocks of rows, distributed over the chip's cores. Each block visits the rows of other
arrays that it needs, one window at a time, through two buffers on chip. The copy of the next window overlaps
the computation of the present one, across blocks too: a block's last visit fetches the next block's first
window.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.lax import Precision

LANES = 128  # lanes of a vector register
CORES = 2  # cores of a v5p; a chip of one core runs the blocks of both, one core's after the other's
LOG2_E = math.log2(math.e)
NEG_INF = -1e30  # the largest score before the first key; finite, so that differences are not NaN


def dot(equation, x, y):
    """Computes a product in float32 of operands of one dtype.

    Float32 operands are multiplied in full precision (six passes).
    """
    precision = Precision.HIGHEST if x.dtype == jnp.float32 else Precision.DEFAULT
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def grid(blocks: int) -> tuple[int, int]:
    """Returns cores and steps for a number of blocks; core c has the blocks c, c + cores, ..."""
    cores = min(CORES, blocks)
    return cores, pl.cdiv(blocks, cores)


def block_index(core, step, blocks: int):
    """Returns the block of a step, for index maps.

    A step behind the last block keeps the block before, and writes nothing.
    """
    cores, _ = grid(blocks)
    block = step * cores + core
    return jnp.where(block < blocks, block, block - cores)


def visit_all(step, visits, next_visits, fetch: Callable, compute: Callable, slot_ref) -> None:
    """Runs `compute(visit, slot)` over a block's visits, each with its window in buffer `slot`.

    Args:
      step: the block's number on this core.
      visits, next_visits: visits of this block and of the one after it; 0 is allowed.
      fetch: `fetch(ahead, visit, slot, action)` starts or waits for (`action` "start" or "wait") the copies
        of a visit of this block (ahead 0) or the next (ahead 1).
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
    """New scores and values for one online softmax, and references to its state.

    Attributes:
      scores: [rows, keys] float32, times log2(e), because the chip's exponential has base 2. -inf where a row
        does not see a key.
      values: [keys, width].
      total: [rows, width] float32 reference, the weighted sum of the values so far.
      largest, weight: [rows, lanes] float32 references, the largest score and the sum of the weights so far,
        in every lane.
    """

    scores: jax.Array
    values: jax.Array
    total: Any
    largest: Any
    weight: Any


def update_softmaxes(updates: Sequence[SoftmaxUpdate]) -> None:
    """Adds keys to independent softmaxes (arXiv:2205.14135), step by step for all of them.

    A step of one softmax hides the latency of the others'.
    """
    before = [x.largest[...] for x in updates]
    largest = [jnp.maximum(b, jnp.max(x.scores, axis=1, keepdims=True)) for x, b in zip(updates, before, strict=True)]
    decay = [jnp.exp2(b - m) for b, m in zip(before, largest, strict=True)]
    weights = [jnp.exp2(x.scores - m[:, :1]) for x, m in zip(updates, largest, strict=True)]
    mixed = [dot("qk,kh->qh", w.astype(x.values.dtype), x.values) for x, w in zip(updates, weights, strict=True)]
    for x, m, f, w, new in zip(updates, largest, decay, weights, mixed, strict=True):
        x.largest[...] = m
        x.weight[...] = x.weight[...] * f + jnp.sum(w, axis=1, keepdims=True)
        x.total[...] = x.total[...] * f[:, :1] + new
