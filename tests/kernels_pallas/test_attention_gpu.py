"""The Hopper attention kernels without such a GPU: in the program, planned, refused and interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import tuning
from kernels_pallas.causal_attention import causal_attention
from kernels_pallas.causal_attention import gpu as causal_gpu
from kernels_pallas.causal_attention import gpu_backward as causal_backward
from kernels_pallas.causal_attention import gpu_forward as causal_forward
from kernels_pallas.gpu import tile_ranges
from kernels_pallas.packed_attention import gpu_backward, gpu_forward, packed_attention, window_attention
from kernels_pallas.paged_attention import PAGE, gpu_decode, gpu_prefill, paged_attention
from tests.kernels_pallas.mosaic_interpreted import product
from tests.kernels_pallas.test_gated_delta_gpu import described_gpu, exported, needs_mosaic
from tests.tolerances import PACKED_ATTENTION, PAGED_ATTENTION, relative_rms
from tests.variants import in_full


def like(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def paged(tokens, sequences, *, heads=8, key_heads=2, width=256, dtype=jnp.bfloat16):
    pool, numbers = like(40, PAGE, key_heads * width, dtype=dtype), like(sequences, dtype=jnp.int32)
    return like(tokens, heads, width, dtype=dtype), pool, pool, like(sequences, 16, dtype=jnp.int32), numbers, numbers, numbers


def packed(*, heads=16, width=72, dtype=jnp.bfloat16):
    return [like(200, heads, width, dtype=dtype)] * 3 + [like(3, dtype=jnp.int32)] * 2


def rows():
    return like(2, 256, 8, 256), like(2, 256, 2, 256), like(2, 256, 2, 256), like(2, 256, dtype=jnp.int32)


@needs_mosaic
@pytest.mark.parametrize(
    ("operation", "arguments", "kernels"),
    [
        (functools.partial(paged_attention, max_query_len=1), paged(8, 8), ("paged_attention_decode", "paged_attention_join")),
        (functools.partial(paged_attention, max_query_len=200), paged(200, 3), ("paged_attention_prefill",)),
        (functools.partial(packed_attention, longest=96), packed(), ("packed_attention",)),
        (functools.partial(window_attention, window=4), packed()[:3], ("packed_attention",)),
        (causal_attention, rows(), ("causal_attention",)),
    ],
)
def test_kernels_are_in_the_program(operation, arguments, kernels):
    with described_gpu():
        for backend in ("hopper", None):
            program = exported(functools.partial(operation, backend=backend), *arguments)
            assert all(kernel in program for kernel in kernels)
        assert "mosaic_gpu" not in exported(functools.partial(operation, backend="reference"), *arguments)
    assert "mosaic_gpu" not in exported(functools.partial(operation, backend=None), *arguments)  # this machine's device is a CPU


@needs_mosaic
def test_gradient_kernels_are_in_the_program():
    def loss(q, k, v, starts, lengths):
        return packed_attention(q, k, v, starts, lengths, longest=96, backend="hopper").astype(jnp.float32).sum()

    with described_gpu():
        program = exported(jax.grad(loss, (0, 1, 2)), *packed())
    assert all(kernel in program for kernel in ("packed_attention_dq", "packed_attention_dkv"))


@pytest.mark.parametrize(
    ("operation", "arguments", "message"),
    [
        (functools.partial(paged_attention, max_query_len=1), paged(8, 8, width=128), "q has heads of 128, and it takes 256"),
        (
            functools.partial(paged_attention, max_query_len=1),
            paged(8, 8, key_heads=4),
            "there are 8 query and 4 key-value heads, and it takes 8 and 2",
        ),
        (
            functools.partial(paged_attention, max_query_len=1),
            paged(8, 8, dtype=jnp.float32),
            "q is float32 and keys float32, and it takes bfloat16 for both",
        ),
        (functools.partial(packed_attention, longest=96), packed(width=64), "q has heads of 64, and it takes 72"),
        (functools.partial(packed_attention, longest=96), packed(heads=3), "q has 3 heads, and it takes an even number"),
        (functools.partial(window_attention, window=4), packed(dtype=jnp.float32)[:3], "q is float32, and it takes bfloat16"),
    ],
)
def test_unsupported_arguments_are_refused(operation, arguments, message):
    with pytest.raises(NotImplementedError, match=f"backend 'hopper': {message}; backend 'reference' serves it"):
        jax.eval_shape(functools.partial(operation, backend="hopper"), *arguments)


def test_rows_must_be_a_multiple_of_the_window():
    arguments = [like(202, 16, 72)] * 3
    with pytest.raises(ValueError, match="q has 202 rows, expected a multiple of the window, 4"):
        jax.eval_shape(functools.partial(window_attention, window=4), *arguments)


@pytest.mark.parametrize("seed", [0, 1, *in_full(2, 3, 4)])
def test_tile_ranges_cover_every_visible_key(seed):
    """Each warpgroup's tiles hold all keys that its rows see.

    Unmasked tiles are visible to all of its rows.
    """
    rng, groups, tile = np.random.default_rng(seed), 3, 128
    lengths = rng.integers(1, 500, 7)
    starts = np.cumsum(rng.integers(0, 9, 7) + np.concatenate([[0], lengths[:-1]]))
    rows = int(starts[-1] + lengths[-1] + rng.integers(0, 400))
    first, end = tile_ranges.views(jnp.asarray(starts, jnp.int32), jnp.asarray(lengths, jnp.int32), rows)
    ranges = jax.tree.map(np.asarray, tile_ranges.plan_tile_ranges(first, end, groups, tile))
    for block, (begin, count) in enumerate(zip(ranges.begin, ranges.count, strict=True)):
        assert begin % 8 == 0
        for group in range(groups):
            at = (block * groups + group) * 64
            low, high = ranges.first[at : at + 64], ranges.end[at : at + 64]
            read_begin, read_end, unmasked_begin, unmasked_end = ranges.groups[block, group]
            assert 0 <= read_begin <= read_end <= count
            real = low < high
            if real.any():
                assert begin + read_begin * tile <= low[real].min()
                assert begin + read_end * tile >= high[real].max()
            for i in range(read_begin, read_end):
                if unmasked_begin <= i < unmasked_end:
                    assert real.all()
                    assert (low <= begin + i * tile).all()
                    assert (high >= begin + (i + 1) * tile).all()


@pytest.mark.parametrize("seed", range(5))
def test_pages_are_split_evenly_and_once(seed):
    rng = np.random.default_rng(seed)
    contexts = rng.integers(0, [1, 200, 3000, 20000, 70000][seed] + 1, 50) * (rng.random(50) < 0.8)
    plan = jax.tree.map(np.asarray, gpu_decode.split_pages(jnp.asarray(contexts, jnp.int32), 132))
    pages, slots = -(-contexts // PAGE), set()
    for block, (first, count) in enumerate(zip(plan.first_sequence, plan.num_sequences, strict=True)):
        begin, end = block * plan.pages_per_block[0], (block + 1) * plan.pages_per_block[0]
        for s in range(first, first + count):
            low, high = max(begin - plan.page_offsets[s], 0), min(end, plan.page_offsets[s + 1]) - plan.page_offsets[s]
            pages[s] -= max(high - low, 0)
            if high > low:
                assert block + s not in slots
                slots.add(block + s)
    assert not pages.any()


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the kernels in Mosaic's interpreter, on fewer SMs."""
    for module in (gpu_forward, gpu_backward, gpu_decode, gpu_prefill):
        monkeypatch.setattr(module, "accumulate", lambda total, a, b: total + product(a, b))
        if hasattr(module, "product"):
            monkeypatch.setattr(module, "product", product)
    monkeypatch.setattr(gpu_forward, "num_sms", lambda: 2)
    monkeypatch.setattr(gpu_decode, "num_sms", lambda: 3)
    monkeypatch.setattr(gpu_prefill, "num_sms", lambda: 132)
    with jax.numpy_rank_promotion("allow"), plgpu.force_gpu_interpret_mode():
        yield


@needs_mosaic
def test_packed_attention_and_its_gradients_interpreted(interpreted):
    rng = np.random.default_rng()
    lengths, rows = [40, 30, 50], 144
    starts, sizes = jnp.asarray([3, 43, 80], jnp.int32), jnp.asarray(lengths, jnp.int32)
    q, k, v, cotangent = jnp.asarray(rng.standard_normal((4, rows, 2, 72)), jnp.bfloat16)
    first, end = tile_ranges.views(starts, sizes, rows)
    cut = [{"groups": 2, "tile": 64, "stages": 2}]
    with tuning.using({"hopper": {"any": {"packed_attention": cut, "packed_attention_backward": cut}}}):
        out, sums = gpu_forward.forward(q, k, v, first, end)
        gradients = gpu_backward.backward(q, k, v, out, sums, cotangent, first, end)
    dense = functools.partial(packed_attention, starts=starts, lengths=sizes, longest=50, backend="reference")
    expected, pull = jax.vjp(dense, *(x.astype(jnp.float32) for x in (q, k, v)))
    assert relative_rms(out, expected) < PACKED_ATTENTION["gpu bfloat16"]
    assert not np.asarray(out, np.float32)[:3].any()
    for found, target in zip(gradients, pull(cotangent.astype(jnp.float32)), strict=True):
        assert relative_rms(found, target) < PACKED_ATTENTION["gpu bfloat16 gradient"]


@needs_mosaic
def test_causal_attention_and_its_gradients_interpreted(monkeypatch):
    """Two rows, four query heads per key-value head.

    Sequences end inside a tile, on its edge, and after one token.
    """
    for module in (causal_forward, causal_backward):
        for name, stand_in in (("product", product), ("accumulate", lambda total, a, b: total + product(a, b))):
            monkeypatch.setattr(module, name, stand_in, raising=False)
    rng, T = np.random.default_rng(), 168
    ends = jnp.asarray([[70, 71, 128], [64, 160, 161]], jnp.int32)[:, None]
    segments = (jnp.arange(T, dtype=jnp.int32)[None, :, None] >= ends).sum(axis=-1, dtype=jnp.int32)
    q, cotangent = jnp.asarray(rng.standard_normal((2, 2, T, 4, 256)), jnp.bfloat16)
    k, v = jnp.asarray(rng.standard_normal((2, 2, T, 1, 256)), jnp.bfloat16)
    with jax.numpy_rank_promotion("allow"), plgpu.force_gpu_interpret_mode():
        out, pull = jax.vjp(lambda *x: causal_gpu.causal_attention(*x, segments), q, k, v)
        gradients = pull(cotangent)
    plain = functools.partial(causal_attention, segments=segments, backend="reference")
    expected, pull = jax.vjp(plain, *(x.astype(jnp.float32) for x in (q, k, v)))
    assert relative_rms(out, expected) < PACKED_ATTENTION["gpu bfloat16"]
    for found, target in zip(gradients, pull(cotangent.astype(jnp.float32)), strict=True):
        assert relative_rms(found, target) < PACKED_ATTENTION["gpu bfloat16 gradient"]


@needs_mosaic
@pytest.mark.parametrize(
    ("run", "lengths", "contexts", "longest"),
    [
        (gpu_decode.decode, [1, 0, 1], [70, 64, 200], 1),
        (gpu_decode.decode, [0, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1], [9, 130, 64, 64, 200, 1, 10, 70, 9, 64, 9, 3], 1),
        (gpu_decode.decode, [2, 1], [70, 130], 2),
        (gpu_prefill.prefill, [40, 0, 3], [100, 30, 130], 40),
        (functools.partial(gpu_prefill.prefill, splits=3), [40], [200], 40),
    ],
    ids=["decode", "resting rows between others", "drafts", "prefill", "split along the pages"],
)
def test_paged_attention_interpreted(interpreted, run, lengths, contexts, longest):
    """Pages are in random order; pages and tokens outside of the sequences are NaN."""
    rng = np.random.default_rng()
    counts = [-(-context // PAGE) for context in contexts]
    order, at = rng.permutation(sum(counts) + 2), 0
    tables, pools = np.full((len(lengths), max(counts) + 1), -1, np.int32), rng.standard_normal((2, len(order), PAGE, 512))
    clean = np.array(pools)
    for s, (count, context) in enumerate(zip(counts, contexts, strict=True)):
        tables[s, :count], at = order[at : at + count], at + count
        if context % PAGE:
            pools[:, tables[s, count - 1], context % PAGE :] = np.nan
    pools[:, order[at:]] = np.nan
    starts = np.cumsum([0, *lengths[:-1]]) if longest > 1 else np.arange(len(lengths))
    q = jnp.asarray(rng.standard_normal((max(sum(lengths), len(lengths)), 8, 256)), jnp.bfloat16)
    numbers = [jnp.asarray(x, jnp.int32) for x in (tables, starts, lengths, contexts)]
    out = run(q, *jnp.asarray(pools, jnp.bfloat16), *numbers, max_query_len=longest)
    rounded = jnp.asarray(clean, jnp.bfloat16).astype(jnp.float32)
    expected = paged_attention(q.astype(jnp.float32), *rounded, *numbers, max_query_len=longest, backend="reference")
    assert relative_rms(out, expected) < PAGED_ATTENTION["gpu bfloat16"]
