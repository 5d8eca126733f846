"""Top-k and top-p thresholds for Hopper: a cluster of blocks reads a row once and keeps it in registers.

The threshold is found two bits of the float at a time: each pass sums the weights above three levels. The
blocks write their sums into each other's shared memory, so that all continue with the same sums. Rows without
top-k or without top-p skip that search.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Int32

from kernels_pallas.backends import mosaic_unsupported_reason
from kernels_pallas.gpu.export_cache import exported_once
from kernels_pallas.gpu.mosaic import barrier_of, barrier_sync, cluster_refs, cluster_sync, clustered, load, params, store

PARTS, GROUPS = 8, 4  # blocks of a cluster, which has one row; warpgroups of a block
BITS = 2  # bits found in a pass
LANES = 128  # scores that a warpgroup loads at once, one per CUDA thread
MAX_HELD = 64  # the most scores that a CUDA thread keeps in registers
LINE = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
# Sums of up to 16 levels over the CUDA threads: eight neighbouring threads have one level.
LEVELS = 16
BY_LEVEL = plgpu.Layout.TILED(plgpu.Tiling(((16, 16), (4, 16), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
LEVEL = BY_LEVEL.reduce(1)


def unsupported_reason(scores: jax.Array) -> str | None:
    """Returns why the kernel does not serve these arguments, or None if it does."""
    V, most = scores.shape[1], PARTS * GROUPS * LANES * MAX_HELD
    if not LANES <= V <= most:
        return f"a row has {V} scores, and it takes {LANES} to {most}"
    return mosaic_unsupported_reason()


@exported_once
def sampling_threshold(
    scores: Float32[Array, "B V"], best: Float32[Array, " B"], top_k: Int32[Array, " B"], top_p: Float32[Array, " B"]
) -> Float32[Array, " B"]:
    """Computes `api.sampling_threshold`."""
    B, V = scores.shape
    workers = PARTS * GROUPS
    kernel = plgpu.kernel(
        functools.partial(_kernel, held=-(-V // (workers * LANES))),
        out_type=jax.ShapeDtypeStruct((B, LANES), jnp.float32),  # the same in every lane
        grid=(B,),
        grid_names=("row",),
        num_threads=GROUPS,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((GROUPS, LEVELS, LANES), jnp.float32),  # each CUDA thread's sums
            plgpu.SMEM((2, workers, LEVELS), jnp.float32),  # each warpgroup's sums, of this pass and the one before
            plgpu.SMEM((GROUPS, LEVELS), jnp.float32),  # the totals, for each warpgroup to read
            barrier_of(PARTS, GROUPS),
        ],
        compiler_params=params(approximate=True),
        kernel_name="top_k_top_p",
        **clustered(PARTS),
    )
    return kernel(scores, best, top_k, top_p)[:, 0]


def _kernel(scores, best, top_k, top_p, out, *scratch, held):
    row, V = lax.axis_index("row"), scores.shape[1]
    share = _RowShare(scores, *scratch, held)
    k, p, peak = top_k[row], top_p[row], best[row]

    def weigh(x):
        return jnp.exp(x - peak)

    def search_top_k():
        return share.search(lambda x: 1.0, k.astype(jnp.float32), jnp.float32(-math.inf), jnp.int32(0))

    def keep_all():
        return jnp.float32(-math.inf), jnp.int32(0)

    kth, turn = lax.cond((k > 0) & (k < V), search_top_k, keep_all)

    def search_top_p():
        (total,) = share.above([kth], weigh, turn)
        return share.search(weigh, p * total, kth, turn + 1)[0]

    last = lax.cond(p < 1.0, search_top_p, lambda: kth)

    @pl.when(share.worker == 0)
    def _():
        store(out.at[row], jnp.where(share.lane >= 0, last, 0.0))


class _RowShare:
    """A warpgroup's share of its row's scores, in registers.

    The warpgroups of a row form one line of workers.
    """

    def __init__(self, scores, lanes_s, sums_s, totals_s, barrier, held):
        self.lanes_s, self.sums_s, self.totals_s, self.barrier = lanes_s, sums_s, totals_s, barrier
        self.group = lax.axis_index("group")
        self.worker = (lax.axis_index("part") if PARTS > 1 else 0) * GROUPS + self.group
        self.lane = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=LINE)
        begin = self.worker * held * LANES
        first = jnp.minimum(begin, scores.shape[1] - held * LANES)  # the last workers read scores of others again, as NaN
        self.scores = []
        for at in range(0, held * LANES, LANES):
            x = load(scores.at[lax.axis_index("row"), pl.ds(first + at, LANES)], LINE)
            self.scores.append(jnp.where(self.lane + (first + at) >= begin, x, math.nan))

    def above(self, levels, weigh, turn):
        """Sums the weights of the row's scores from each of these levels on.

        `turn` is the number of earlier calls.
        """
        found = [plgpu.layout_cast(jnp.zeros(LANES, jnp.float32), LINE)] * len(levels)
        for x in self.scores:
            weight = weigh(x)
            found = [jnp.where(x >= level, total + weight, total) for total, level in zip(found, levels, strict=True)]
        for i, total in enumerate(found):
            store(self.lanes_s.at[self.group, i], total)
        plgpu.commit_smem()
        own = jnp.sum(load(self.lanes_s.at[self.group], BY_LEVEL), axis=1)
        sums = self.sums_s.at[lax.rem(turn, 2)]
        for ref in cluster_refs(sums.at[self.worker], PARTS):
            store(ref, own)
        (cluster_sync if PARTS > 1 else barrier_sync)(self.barrier)
        totals = [load(sums.at[worker], LEVEL) for worker in range(sums.shape[0])]
        store(self.totals_s.at[self.group], functools.reduce(jnp.add, totals))
        plgpu.commit_smem()
        return [self.totals_s[self.group, i] for i in range(len(levels))]

    def search(self, weigh, least, floor, turn):
        """Finds the highest level from which on the weights sum to `least`; at least `floor`.

        Returns:
          The level and the next turn.
        """

        def narrow(i, carry):
            found, turn = carry
            shift = 32 - BITS * (i + 1)
            levels = [jnp.maximum(score_at(found | (jnp.int32(j) << shift)), floor) for j in range(1, 2**BITS)]
            reached = sum((total >= least).astype(jnp.int32) for total in self.above(levels, weigh, turn))
            return found | (reached << shift), turn + 1

        found, turn = lax.fori_loop(0, 32 // BITS, narrow, (jnp.int32(0), turn))
        return jnp.maximum(score_at(found), floor), turn


def score_at(rank):
    """Computes `reference.score_at` for the bits of one unsigned integer."""
    lowest, rest, normal = (jnp.int32(x) for x in (0x007FFFFF - 2**31, 2**31 - 1, 0x00800000))
    key = jnp.maximum(rank ^ jnp.int32(-(2**31)), lowest)  # the same order for signed integers
    bits = jnp.where(key >= 0, key, key ^ rest)
    return jnp.where((bits & rest) < normal, 0.0, lax.bitcast_convert_type(bits, jnp.float32))
