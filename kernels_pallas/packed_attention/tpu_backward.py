"""Packed attention on TPU, backward (arXiv:2205.14135): two kernels, which compute the weights anew.

For the queries' cotangents one walks through blocks of queries and visits windows of keys and values, as the forward kernel does.
For the keys' and values' the other walks through blocks of keys and visits windows of queries. `sums` has of each row, head n, in
lane n the logarithm (base 2) of the sum of its exponentials, in lane N + n the product of its result with the result's cotangent.
Glossary as in tpu_forward.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.packed_attention.tpu_forward import Plan, grouped, overlaps, window
from kernels_pallas.packed_attention.tpu_views import bounds, column, cut, numbers, strangers, window_row
from kernels_pallas.tpu_stream import LOG2_E, block_index, dot, grid, visit_all


def plan(N: int, P: int, longest: int) -> Plan:
    """The cut for a row of P rows."""
    return Plan(N, 128, 128, window(P, longest))


def queries(
    q: Float[Array, "P D"],
    k: Float[Array, "P D"],
    v: Float[Array, "P D"],
    out_bar: Float[Array, "P D"],
    sums: Float32[Array, "P lanes"],
    starts: Int32[Array, " I"],
    lengths: Int32[Array, " I"],
    plan: Plan,
) -> Float[Array, "P D"]:
    """The queries' cotangents."""
    (bar,) = _call(_queries_kernel, "packed_attention_queries", (q, out_bar, sums), (k, v), starts, lengths, plan, 1)
    return bar


def keys_values(
    q: Float[Array, "P D"],
    k: Float[Array, "P D"],
    v: Float[Array, "P D"],
    out_bar: Float[Array, "P D"],
    sums: Float32[Array, "P lanes"],
    starts: Int32[Array, " I"],
    lengths: Int32[Array, " I"],
    plan: Plan,
) -> tuple[Float[Array, "P D"], Float[Array, "P D"]]:
    """The keys' and the values' cotangents."""
    return _call(_keys_values_kernel, "packed_attention_keys_values", (k, v), (q, out_bar, sums), starts, lengths, plan, 2)


def _call(kernel, name, own, others, starts, lengths, plan, results):
    """Over blocks of `own`, each of which visits windows of `others`; `results` arrays like the first of `own`."""
    (P, D), (N, L, tile, W) = own[0].shape, plan
    assert tile == L, f"blocks of {L} rows are computed {tile} rows at once"
    blocks = pl.cdiv(P, L)
    cores, steps = grid(blocks)
    *scalars, lower, upper = cut(*bounds(starts, lengths, P), L, tile, W, 2 * cores)

    def block(*shape):
        return pl.BlockSpec(shape, lambda core, step, *_: (block_index(core, step, blocks), *[0] * (len(shape) - 1)))

    views, hbm = block(1, 1, tile), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        functools.partial(_kernel, body=kernel, own=len(own), others=len(others), plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, steps),
            in_specs=[views, views, *[block(L, x.shape[1]) for x in own], *[hbm] * len(others)],
            out_specs=[block(L, D)] * results,
            scratch_shapes=[
                *[pltpu.VMEM((2, W, x.shape[1]), x.dtype) for x in others],
                *[pltpu.VMEM((N, L, D // N), jnp.float32)] * results,
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((P, D), own[0].dtype)] * results,
        compiler_params=plan.limits(),
        name=name,
    )(*scalars, lower, upper, *own, *others)


def _kernel(begin, visits, spans, lower_ref, upper_ref, *refs, body, own, others, plan):
    own_refs, sources, rest = refs[:own], refs[own : own + others], refs[own + others :]
    slot_ref, semaphores = rest[-2:]
    results = (len(rest) - 2 - others) // 2
    out_refs, buffers, total_refs = rest[:results], rest[results : results + others], rest[results + others : -2]
    cores, step = pl.num_programs(0), pl.program_id(1)
    block = step * cores + pl.program_id(0)
    (N, L, _, W), P = plan, sources[0].shape[0]
    H = out_refs[0].shape[1] // N

    def fetch(ahead, visit, slot, action):
        row = window_row(begin[block + ahead * cores], visit, W, P)
        for source, buffer in zip(sources, buffers, strict=True):
            transfer = pltpu.make_async_copy(source.at[pl.ds(row, W)], buffer.at[slot], semaphores.at[slot])
            getattr(transfer, action)()

    for total_ref in total_refs:
        total_ref[...] = jnp.zeros_like(total_ref)

    def compute(visit, slot):
        first = begin[block] + visit * W
        row = window_row(begin[block], visit, W, P)

        @pl.when(overlaps(spans, block, row, W))
        def _():
            here = [buffer.at[slot] for buffer in buffers]
            body(lower_ref[0], upper_ref[0], row, first.astype(jnp.float32), own_refs, here, total_refs, N)

    visit_all(step, visits[block], visits[block + cores], fetch, compute, slot_ref)

    @pl.when(block * L < P)
    def _():
        for total_ref, out_ref in zip(total_refs, out_refs, strict=True):
            for n in range(N):
                out_ref[:, n * H : (n + 1) * H] = total_ref[n].astype(out_ref.dtype)


def _queries_kernel(lower, upper, row, first, own_refs, window_refs, total_refs, N):
    (q_ref, bar_ref, sums_ref), (k_ref, v_ref), (total_ref,) = own_refs, window_refs, total_refs
    L, D = q_ref.shape
    unseen = strangers(column(lower), column(upper), numbers((L, k_ref.shape[0]), 1, row), first)
    for heads in grouped(N, D // N):
        changes = [change for _, change in _weights(heads, q_ref, k_ref, v_ref, bar_ref, sums_ref, unseen, N)]
        for (n, lanes), change in zip(heads, changes, strict=True):
            total_ref[n] += dot("qk,kh->qh", change.astype(k_ref.dtype), k_ref[:, lanes])


def _keys_values_kernel(lower, upper, row, first, own_refs, window_refs, total_refs, N):
    (k_ref, v_ref), (q_ref, bar_ref, sums_ref), (key_ref, value_ref) = own_refs, window_refs, total_refs
    W, D = q_ref.shape
    unseen = strangers(lower, upper, numbers((W, k_ref.shape[0]), 0, row), first)
    for heads in grouped(N, D // N):
        found = _weights(heads, q_ref, k_ref, v_ref, bar_ref, sums_ref, unseen, N)
        for (n, lanes), (weights, change) in zip(heads, found, strict=True):
            key_ref[n] += dot("qk,qh->kh", change.astype(q_ref.dtype), q_ref[:, lanes])
            value_ref[n] += dot("qk,qh->kh", weights.astype(q_ref.dtype), bar_ref[:, lanes])


def _weights(heads, q_ref, k_ref, v_ref, bar_ref, sums_ref, unseen, N):
    """Of each head the softmax's weights and the scores' cotangents, times the scale, [queries, keys] float32."""
    scale = (q_ref.shape[1] // N) ** -0.5
    scores = [dot("qh,kh->qk", q_ref[:, lanes], k_ref[:, lanes]) * (scale * LOG2_E) + unseen for _, lanes in heads]
    by_value = [dot("qh,kh->qk", bar_ref[:, lanes], v_ref[:, lanes]) for _, lanes in heads]
    weights = [jnp.exp2(x - sums_ref[:, n : n + 1]) for (n, _), x in zip(heads, scores, strict=True)]
    return [(w, w * (x - sums_ref[:, N + n : N + n + 1]) * scale) for (n, _), w, x in zip(heads, weights, by_value, strict=True)]
