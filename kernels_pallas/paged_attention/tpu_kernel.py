"""Paged attention kernel on TPU: one block of queries per step of the grid, which fetches its own pages.

A step's rows are queries times heads. In prefill each key-value head has its own product with its lanes of
the pages. The few queries of decode leave the matrix unit idle, so one product serves all heads: a row holds
its query in the lanes of its own key-value head, and zeros in the others'. A block's pages are listed in its
sequence's row of the block tables, which is copied to scalar memory with the block. The next block's first
pages are prefetched, so that their copies can start early.
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

JOINT = 8  # up to this number of queries of a block, one product serves all heads
TILE = 64  # queries computed at once


class QueryTiling(NamedTuple):
    """The sizes of the kernel's blocks.

    Attributes:
      heads, key_heads: N and K.
      queries: queries of a block.
      tile: queries computed at once.
      pages: pages of a visit.
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
        """Query heads of one product, which are rows of one query."""
        return self.heads if self.joint else self.heads // self.key_heads


def query_tiling(N: int, K: int, max_query_len: int, dtype: jnp.dtype) -> QueryTiling:
    """Returns the block sizes for at most `max_query_len` queries per sequence."""
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
    """Runs the kernel over all blocks.

    Result rows of queries that are not real are undefined.
    """
    (C, groups, R, H), (_, page, KH), M = q.shape, keys.shape, block_tables.shape[1]
    cores, steps = grid(C)
    padding = cores * (steps + 1) - C  # a step reads the next step's scalars
    real = jnp.pad(blocks.real.sum(axis=1, dtype=jnp.int32), (0, padding))
    sequence, first = (jnp.pad(x, (0, padding)) for x in (blocks.sequence, blocks.positions[:, 0]))
    first_pages = jnp.pad(block_tables[:, : tiling.pages], ((0, 0), (0, max(tiling.pages - M, 0))))[sequence].reshape(-1)

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
    )(sequence, first, real, first_pages, q, block_tables[:, None], keys, values)


def _kernel(
    _,
    first,
    real,
    first_pages,
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
    page, num_pages = keys_ref.shape[1], keys_ref.shape[0]
    W = tiling.pages * page

    def context_len(ahead):  # tokens
        target = block + ahead * cores
        return jnp.where(real[target] > 0, first[target] + real[target], 0)

    def fetch(ahead, visit, slot, action):
        def copy(i, _):
            at = visit * tiling.pages + i
            page_number = first_pages[(block + cores) * tiling.pages + i] if ahead else table_ref[0, 0, at]
            page_number = jnp.clip(page_number, 0, num_pages - 1)
            for source, buffers in ((keys_ref, key_buffers), (values_ref, value_buffers)):
                transfer = pltpu.make_async_copy(source.at[page_number], buffers.at[slot, i], semaphores.at[slot])
                getattr(transfer, action)()

        pages = pl.cdiv(context_len(ahead), page) - visit * tiling.pages
        jax.lax.fori_loop(0, jnp.minimum(pages, tiling.pages), copy, None)

    @pl.when(real[block] > 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)
        weight_ref[...] = jnp.zeros_like(weight_ref)
        largest_ref[...] = jnp.full_like(largest_ref, NEG_INF)

    def compute(visit, slot):
        for tile in range(tiling.queries // tiling.tile):
            first_position = first[block] + tile * tiling.tile  # position of the tile's first query
            any_visible = (tile * tiling.tile < real[block]) & (visit * W < first_position + tiling.tile)
            all_visible = (visit + 1) * W <= first_position + 1

            def attend(masked, tile=tile, first_position=first_position):
                rows = slice(tile * tiling.tile * tiling.heads_at_once, (tile + 1) * tiling.tile * tiling.heads_at_once)

                def softmax(group):
                    q, k, v = _operands(q_ref, key_buffers.at[slot], value_buffers.at[slot], group, rows, tiling)
                    scores = dot("qh,kh->qk", q, k) * (q_ref.shape[3] ** -0.5 * LOG2_E)
                    if masked:
                        scores, v = _mask(scores, v, visit * W, first_position, context_len(0), tiling)
                    return SoftmaxUpdate(scores, v, *(x.at[group, rows] for x in (total_ref, largest_ref, weight_ref)))

                update_softmaxes([softmax(group) for group in range(q_ref.shape[1])])

            pl.when(any_visible & all_visible)(functools.partial(attend, False))
            pl.when(any_visible & ~all_visible)(functools.partial(attend, True))

    visit_all(step, pl.cdiv(context_len(0), W), pl.cdiv(context_len(1), W), fetch, compute, slot_ref)

    @pl.when(real[block] > 0)
    def _():
        for group in range(q_ref.shape[1]):
            out = total_ref[group] / weight_ref[group][:, :1]
            out_ref[0, group] = _select_key_head(out, tiling).astype(out_ref.dtype)


def _operands(q_ref, keys_ref, values_ref, group, rows, tiling):
    """Returns queries, keys and values of one product, [rows, width] and [W, width]."""
    q, H = q_ref[0, group, rows], q_ref.shape[3]
    lanes = slice(0, tiling.key_heads * H) if tiling.joint else slice(group * H, (group + 1) * H)
    k, v = (x[:, :, lanes].reshape(-1, lanes.stop - lanes.start) for x in (keys_ref, values_ref))
    if tiling.joint:
        key_head = _key_head_of_rows(q.shape, tiling)
        q = jnp.concatenate([jnp.where(key_head == head, q, jnp.zeros_like(q)) for head in range(tiling.key_heads)], axis=1)
    return q, k, v


def _key_head_of_rows(shape, tiling):
    """Returns the key-value head of each row of a joint product."""
    head = jax.lax.broadcasted_iota(jnp.int32, shape, 0) % tiling.heads
    return head // (tiling.heads // tiling.key_heads)


def _select_key_head(out, tiling):
    """Selects the lanes of each row's own key-value head from a joint product."""
    if not tiling.joint:
        return out
    heads = jnp.split(out, tiling.key_heads, axis=1)
    key_head = _key_head_of_rows(heads[0].shape, tiling)
    return functools.reduce(lambda rest, i: jnp.where(key_head == i, heads[i], rest), range(1, tiling.key_heads), heads[0])


def _mask(scores, v, first_token, first_position, context_len, tiling):
    """Masks scores of tokens after each query, and zeroes values past the context, which may be NaN."""
    query = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) // tiling.heads_at_once
    token = first_token + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(token <= first_position + query, scores, -jnp.inf)
    visible = first_token + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < context_len
    return scores, jnp.where(visible, v, jnp.zeros_like(v))
