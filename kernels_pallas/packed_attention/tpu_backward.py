"""Backward kernels of packed attention on TPU (arXiv:2205.14135); both recompute the weights.

The kernel for the queries' gradient visits windows of keys and values for each block of queries, as the
forward kernel does. The kernel for the keys' and values' gradients visits windows of queries for each block
of keys. For head n of each row, `sums` has the base-2 logarithm of the sum of exponentials in lane n, and the
product of the result with its gradient in lane N + n.
Glossary as in tpu_forward.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.packed_attention.tpu_forward import TILE, BlockSizes, for_heads, overlaps_tile, split_heads, window_rows
from kernels_pallas.packed_attention.tpu_views import column, cut_blocks, outside_mask, visit_window
from kernels_pallas.tpu.stream import LANES, LOG2_E, block_index, dot, grid, visit_all


def block_sizes(N: int, P: int, longest: int, dtype: jnp.dtype) -> BlockSizes:
    """Returns the block sizes for a row of P rows."""
    return BlockSizes(N, TILE, TILE, window_rows(P, longest, dtype))


def queries(
    q: Float[Array, "P D"],
    k: Float[Array, "P D"],
    v: Float[Array, "P D"],
    d_out: Float[Array, "P D"],
    sums: Float32[Array, "P lanes"],
    lower: Int32[Array, " P"],
    upper: Int32[Array, " P"],
    sizes: BlockSizes,
) -> Float[Array, "P D"]:
    """Returns the queries' gradient."""
    (d_q,) = _call(_add_queries, "packed_attention_queries", (q, d_out, sums), (k, v), lower, upper, sizes, 1)
    return d_q


def keys_values(
    q: Float[Array, "P D"],
    k: Float[Array, "P D"],
    v: Float[Array, "P D"],
    d_out: Float[Array, "P D"],
    sums: Float32[Array, "P lanes"],
    lower: Int32[Array, " P"],
    upper: Int32[Array, " P"],
    sizes: BlockSizes,
) -> tuple[Float[Array, "P D"], Float[Array, "P D"]]:
    """Returns the keys' and the values' gradients."""
    return _call(_add_keys_values, "packed_attention_keys_values", (k, v), (q, d_out, sums), lower, upper, sizes, 2)


def _call(add, name, own, others, lower, upper, sizes, results):
    """Runs a kernel over blocks of `own`, each of which visits windows of `others`.

    The first two arrays of either have heads; the third array of one of them is `sums`. Returns `results`
    arrays like the first of `own`.
    """
    (P, D), (N, L, tile, W) = own[0].shape, sizes
    assert tile == L, f"blocks of {L} rows are computed {tile} rows at once"
    blocks = pl.cdiv(P, L)
    cores, steps = grid(blocks)
    *scalars, lower, upper = cut_blocks(lower, upper, L, tile, W, 2 * cores)

    def block(*shape):
        return pl.BlockSpec(shape, lambda core, step, *_: (block_index(core, step, blocks), *[0] * (len(shape) - 1)))

    views, hbm = block(1, 1, tile), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        functools.partial(_kernel, add=add, own=len(own), sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, steps),
            in_specs=[views, views, *[block(L, x.shape[1]) for x in own], *[hbm] * len(others)],
            out_specs=[block(L, D)] * results,
            scratch_shapes=[
                [pltpu.VMEM((2, W, x.shape[1]), x.dtype) for x in others],
                [pltpu.VMEM((N, L, D // N), x.dtype) for x in own[:2]],
                [pltpu.VMEM((N, W, D // N), x.dtype) for x in others[:2]],
                [pltpu.VMEM((N, L, D // N), jnp.float32)] * results,
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((P, D), own[0].dtype)] * results,
        compiler_params=sizes.limits(),
        name=name,
    )(*scalars, lower, upper, *own, *others)


def _kernel(begin, size, visits, view_begins, view_ends, lower_ref, upper_ref, *refs, add, own, sizes):
    *refs, buffers, own_heads, window_heads, total_refs, slot_ref, semaphores = refs
    own_refs, sources, out_refs = refs[:own], refs[own : own + len(buffers)], refs[own + len(buffers) :]
    cores, step = pl.num_programs(0), pl.program_id(1)
    block = step * cores + pl.program_id(0)
    (N, L, _, W), P = sizes, sources[0].shape[0]
    H = out_refs[0].shape[1] // N

    def fetch(ahead, visit, slot, action):
        row = visit_window(begin, size, visits, block + ahead * cores, visit, W, P).row
        for source, buffer in zip(sources, buffers, strict=True):
            transfer = pltpu.make_async_copy(source.at[pl.ds(row, W)], buffer.at[slot], semaphores.at[slot])
            getattr(transfer, action)()

    for total_ref in total_refs:
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(visits[block] > 0)
    def _():
        for rows_ref, heads_ref in zip(own_refs[:2], own_heads, strict=True):
            split_heads(rows_ref, heads_ref)

    def compute(visit, slot):
        visited = visit_window(begin, size, visits, block, visit, W, P)

        @pl.when(overlaps_tile(view_begins, view_ends, block, visited))
        def _():
            here = [buffer.at[slot] for buffer in buffers]
            for rows_ref, heads_ref in zip(here[:2], window_heads, strict=True):
                split_heads(rows_ref, heads_ref)
            (sums_ref,) = *own_refs[2:], *here[2:]
            add(lower_ref[0], upper_ref[0], visited, own_heads, window_heads, sums_ref, total_refs)

    visit_all(step, visits[block], visits[block + cores], fetch, compute, slot_ref)

    @pl.when(block * L < P)
    def _():
        for total_ref, out_ref in zip(total_refs, out_refs, strict=True):
            for n in range(N):
                out_ref[:, n * H : (n + 1) * H] = total_ref[n].astype(out_ref.dtype)


def _add_queries(lower, upper, visited, own, window, sums_ref, total_refs):
    (q_ref, d_out_ref), (k_ref, v_ref), (total_ref,) = own, window, total_refs
    mask = outside_mask(column(lower), column(upper), visited, (q_ref.shape[1], k_ref.shape[1]), 1)

    def add(heads):
        d_scores_of_heads = [d_scores for _, d_scores in _weights(heads, q_ref, k_ref, v_ref, d_out_ref, sums_ref, mask)]
        for n, d_scores in zip(heads, d_scores_of_heads, strict=True):
            total_ref[n] += dot("qk,kh->qh", d_scores.astype(k_ref.dtype), k_ref[n])

    for_heads(q_ref.shape[0], add)


def _add_keys_values(lower, upper, visited, own, window, sums_ref, total_refs):
    (k_ref, v_ref), (q_ref, d_out_ref), (key_ref, value_ref) = own, window, total_refs
    mask = outside_mask(lower, upper, visited, (q_ref.shape[1], k_ref.shape[1]), 0)

    def add(heads):
        weights_of_heads = _weights(heads, q_ref, k_ref, v_ref, d_out_ref, sums_ref, mask)
        for n, (weights, d_scores) in zip(heads, weights_of_heads, strict=True):
            key_ref[n] += dot("qk,qh->kh", d_scores.astype(q_ref.dtype), q_ref[n])
            value_ref[n] += dot("qk,qh->kh", weights.astype(q_ref.dtype), d_out_ref[n])

    for_heads(k_ref.shape[0], add)


def _weights(heads, q_ref, k_ref, v_ref, d_out_ref, sums_ref, mask):
    """Returns each head's softmax weights, and the scores' gradients times the scale.

    Both are [queries, keys] float32.
    """
    N, _, H = q_ref.shape
    sums = [pltpu.roll(sums_ref[...], (LANES - n) % LANES, 1) for n in heads]  # moves the head's sums to lanes 0 and N
    scores = [dot("qh,kh->qk", q_ref[n], k_ref[n]) * (H**-0.5 * LOG2_E) + mask for n in heads]
    d_weights = [dot("qh,kh->qk", d_out_ref[n], v_ref[n]) for n in heads]
    weights = [jnp.exp2(x - s[:, :1]) for x, s in zip(scores, sums, strict=True)]
    return [(w, w * (x - s[:, N : N + 1]) * H**-0.5) for w, x, s in zip(weights, d_weights, sums, strict=True)]
