"""Paged attention on TPU: one block of queries in each step of the grid, its sequence's pages copied to the chip on the way.

A step's rows are queries times heads. Each key-value head has its own product with its own lanes of the pages; but a few queries
(decoding) leave the matrix unit idle anyway, so there one product serves all heads: a row holds its query in the lanes of its
own key-value head and zeros in the others'. Which pages a block sees stands in its sequence's row of the tables, which comes to
scalar memory with the block; the next block's first pages are known beforehand, so that they may come early.
Glossary: C blocks, R rows, H head width, W tokens of a visit; the others as in the api.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from kernels_pallas.paged_attention.reference import QueryBlocks
from kernels_pallas.tpu.stream import LANES, LOG2_E, NEG_INF, SoftmaxUpdate, block_index, dot, grid, update_softmaxes, visit_all
from kernels_pallas.tuning import tuned_config

JOINT = 8  # queries of a block, up to which one product serves all heads
TILE = 64  # queries computed at once


class QueryTiling(NamedTuple):
    """How the work is config.

    Attributes:
      heads, key_heads: N and K.
      queries: of a block.
      tile: queries computed at once.
      pages: of a visit.
      joint: whether one product serves all heads.
    """

    heads: int
    key_heads: int
    queries: int
    tile: int
    pages: int
    joint: bool

    @property
    def heads_at_once(self) -> int:
        """Query heads of one product: rows of one query."""
        return self.heads if self.joint else self.heads // self.key_heads


def query_tiling(N: int, K: int, max_query_len: int, dtype: jnp.dtype) -> QueryTiling:
    """The config for calls of at most `max_query_len` queries a sequence."""
    halves = 2 if dtype == jnp.float32 else 1
    config = tuned_config("tpu", "paged_attention", max_query_len)
    if max_query_len <= JOINT:
        return QueryTiling(N, K, max_query_len, max_query_len, config.pages // halves, True)
    return QueryTiling(N, K, min(config.queries, -(-max_query_len // TILE) * TILE), TILE, config.pages // halves, False)


def forward(
    q: Float[Array, "C groups R H"],
    keys: Float[Array, "P page KH"],
    values: Float[Array, "P page KH"],
    block_tables: Int32[Array, "S M"],
    blocks: QueryBlocks,
    tiling: QueryTiling,
) -> Float[Array, "C groups R H"]:
    """The kernel over all blocks; rows of queries that are not real hold anything at all."""
    (C, groups, R, H), (_, page, KH), M = q.shape, keys.shape, block_tables.shape[1]
    cores, steps = grid(C)
    padding = cores * (steps + 1) - C  # a step looks at the next one
    real = jnp.pad(blocks.real.sum(axis=1, dtype=jnp.int32), (0, padding))
    sequence, first = (jnp.pad(x, (0, padding)) for x in (blocks.sequence, blocks.positions[:, 0]))
    begins = jnp.pad(block_tables[:, : tiling.pages], ((0, 0), (0, max(tiling.pages - M, 0))))[sequence].reshape(-1)

    def table_index(core, step, sequence, *_):
        return sequence[block_index(core, step, C)], 0, 0

    rows = pl.BlockSpec((1, groups, R, H), lambda core, step, *_: (block_index(core, step, C), 0, 0, 0))
    table = pl.BlockSpec((1, 1, M), table_index, memory_space=pltpu.SMEM)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    width = KH if tiling.joint else H
    return pl.pallas_call(
        functools.partial(_kernel, tiling=tiling),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(cores, steps),
            in_specs=[rows, table, hbm, hbm],
            out_specs=rows,
            scratch_shapes=[
                pltpu.VMEM((2, tiling.pages, page, KH), keys.dtype),
                pltpu.VMEM((2, tiling.pages, page, KH), keys.dtype),
                pltpu.VMEM((groups, R, width), jnp.float32),
                pltpu.VMEM((groups, R, LANES), jnp.float32),
                pltpu.VMEM((groups, R, LANES), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="paged_attention",
    )(sequence, first, real, begins, q, block_tables[:, None], keys, values)


def _kernel(
    _,
    first,
    real,
    begins,
    q_ref,
    table_ref,
    keys_ref,
    values_ref,
    out_ref,
    key_buffers,
    value_buffers,
    total_ref,
    largest_ref,
    weight_ref,
    slot_ref,
    semaphores,
    *,
    tiling,
):
    cores, step = pl.num_programs(0), pl.program_id(1)
    block = step * cores + pl.program_id(0)
    page, pool = keys_ref.shape[1], keys_ref.shape[0]
    W = tiling.pages * page

    def seen(ahead):  # tokens
        which = block + ahead * cores
        return jnp.where(real[which] > 0, first[which] + real[which], 0)

    def fetch(ahead, visit, slot, action):
        def copy(i, _):
            at = visit * tiling.pages + i
            number = begins[(block + cores) * tiling.pages + i] if ahead else table_ref[0, 0, at]
            number = jnp.clip(number, 0, pool - 1)
            for source, buffers in ((keys_ref, key_buffers), (values_ref, value_buffers)):
                transfer = pltpu.make_async_copy(source.at[number], buffers.at[slot, i], semaphores.at[slot])
                getattr(transfer, action)()

        pages = pl.cdiv(seen(ahead), page) - visit * tiling.pages
        jax.lax.fori_loop(0, jnp.minimum(pages, tiling.pages), copy, None)

    @pl.when(real[block] > 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)
        weight_ref[...] = jnp.zeros_like(weight_ref)
        largest_ref[...] = jnp.full_like(largest_ref, NEG_INF)

    def compute(visit, slot):
        for tile in range(tiling.queries // tiling.tile):
            own = first[block] + tile * tiling.tile  # position of the tile's first query
            some = (tile * tiling.tile < real[block]) & (visit * W < own + tiling.tile)
            whole = (visit + 1) * W <= own + 1

            def attend(masked, tile=tile, own=own):
                rows = slice(tile * tiling.tile * tiling.heads_at_once, (tile + 1) * tiling.tile * tiling.heads_at_once)

                def softmax(group):
                    q, k, v = _operands(q_ref, key_buffers.at[slot], value_buffers.at[slot], group, rows, tiling)
                    scores = dot("qh,kh->qk", q, k) * (q_ref.shape[3] ** -0.5 * LOG2_E)
                    if masked:
                        scores, v = _masked(scores, v, visit * W, own, seen(0), tiling)
                    return SoftmaxUpdate(scores, v, *(x.at[group, rows] for x in (total_ref, largest_ref, weight_ref)))

                update_softmaxes([softmax(group) for group in range(q_ref.shape[1])])

            pl.when(some & whole)(functools.partial(attend, False))
            pl.when(some & ~whole)(functools.partial(attend, True))

    visit_all(step, pl.cdiv(seen(0), W), pl.cdiv(seen(1), W), fetch, compute, slot_ref)

    @pl.when(real[block] > 0)
    def _():
        for group in range(q_ref.shape[1]):
            out = total_ref[group] / weight_ref[group][:, :1]
            out_ref[0, group] = _own_head(out, tiling).astype(out_ref.dtype)


def _operands(q_ref, keys_ref, values_ref, group, rows, tiling):
    """Queries, keys and values of one product, [rows, width] and [W, width]."""
    q, H = q_ref[0, group, rows], q_ref.shape[3]
    lanes = slice(0, tiling.key_heads * H) if tiling.joint else slice(group * H, (group + 1) * H)
    k, v = (x[:, :, lanes].reshape(-1, lanes.stop - lanes.start) for x in (keys_ref, values_ref))
    if tiling.joint:
        own = _key_head(q.shape, tiling)
        q = jnp.concatenate([jnp.where(own == head, q, jnp.zeros_like(q)) for head in range(tiling.key_heads)], axis=1)
    return q, k, v


def _key_head(shape, tiling):
    """Whose each row of a joint product is."""
    head = jax.lax.broadcasted_iota(jnp.int32, shape, 0) % tiling.heads
    return head // (tiling.heads // tiling.key_heads)


def _own_head(out, tiling):
    """Of each row of a joint product the lanes of its own key-value head."""
    if not tiling.joint:
        return out
    heads = jnp.split(out, tiling.key_heads, axis=1)
    own = _key_head(heads[0].shape, tiling)
    return functools.reduce(lambda rest, i: jnp.where(own == i, heads[i], rest), range(1, tiling.key_heads), heads[0])


def _masked(scores, v, first_token, first_position, seen, tiling):
    """Scores without what lies ahead of each query, and values without what no query sees: that may be NaN."""
    query = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) // tiling.heads_at_once
    token = first_token + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(token <= first_position + query, scores, -jnp.inf)
    there = first_token + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < seen
    return scores, jnp.where(there, v, jnp.zeros_like(v))
