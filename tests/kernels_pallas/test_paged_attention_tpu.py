"""The TPU kernel, interpreted on the CPU, against dense attention of each sequence alone in float64.

Interpretation fills unwritten memory with NaN and raises on racing accesses. Copies happen either when they
start or when they are waited for, by the case's mode. Pages of no sequence and tokens past a context are NaN.
Inputs are random in each run; a failure prints the seed.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import backends
from kernels_pallas.paged_attention import paged_attention
from tests.kernels_pallas.test_gated_delta_tpu import HOW, described_tpu, exported
from tests.kernels_pallas.test_paged_attention import alone, draw
from tests.tolerances import PAGED_ATTENTION, relative_rms

WIDTH, KEY_HEADS = 128, 2
poisoned = functools.partial(draw, heads=4, key_heads=KEY_HEADS, width=WIDTH, unseen=np.nan)


@pytest.fixture
def tpu(tpu):
    """Runs paged attention in the TPU interpreter."""
    return lambda *args, max_query_len, mode="on_wait": tpu(
        functools.partial(paged_attention, max_query_len=max_query_len), *args, mode=mode
    )


def arguments(drawn, query_lens, context_lens, dtype=jnp.float32):
    *floats, block_tables, query_starts = drawn
    ints = (np.asarray(x, np.int32) for x in (block_tables, query_starts, query_lens, context_lens))
    return *(jnp.asarray(x, dtype) for x in floats), *map(jnp.asarray, ints)


def check_against_dense(out, q, keys, values, block_tables, query_starts, query_lens, context_lens):
    """Compares each sequence's rows with dense attention; other rows must be zeros."""
    tolerance, unowned = PAGED_ATTENTION[f"tpu {q.dtype}"], np.ones(len(q), bool)
    assert out.dtype == q.dtype
    for s, (start, length, context) in enumerate(zip(query_starts, query_lens, context_lens, strict=True)):
        own = slice(int(start), int(start + length))
        unowned[own] = False
        if length:
            k, v = (
                np.asarray(x)[np.asarray(block_tables)[s]].reshape(-1, KEY_HEADS, WIDTH)[: int(context)] for x in (keys, values)
            )
            assert relative_rms(out[own], alone(np.asarray(q[own]), k, v)) < tolerance
    assert not np.asarray(out)[unowned].any()


@pytest.mark.parametrize(("dtype", "mode"), HOW)
def test_prefill_chunks(dtype, mode, rng, tpu):
    query_lens = [int(n) for n in rng.permutation([0, 1, int(rng.integers(2, 65)), int(rng.integers(65, 140))])]
    context_lens = [max(n + int(rng.choice([0, 1, 63, 64, 300, 511])), 1) for n in query_lens]
    given = arguments(poisoned(rng, query_lens, context_lens, 220), query_lens, context_lens, dtype)
    check_against_dense(tpu(*given, max_query_len=220, mode=mode), *given)


@pytest.mark.parametrize(("dtype", "mode"), HOW)
@pytest.mark.parametrize("drafts", [1, 3])
def test_decode(drafts, dtype, mode, rng, tpu):
    query_lens = [drafts, 0, int(rng.integers(1, drafts + 1)), drafts, 0]
    context_lens = [int(n) for n in rng.choice([drafts, 63, 64, 65, 512, 513, 700], 5)]
    drawn = poisoned(rng, query_lens, context_lens, 5 * drafts + 20)
    seen = np.where(query_lens, context_lens, 0)
    given = arguments(drawn, query_lens, seen, dtype)
    check_against_dense(tpu(*given, max_query_len=drafts, mode=mode), *given)


def test_no_sequence_has_queries(rng, tpu):
    given = arguments(poisoned(rng, [0, 0], [5, 70], 8), [0, 0], [0, 0])
    check_against_dense(tpu(*given, max_query_len=1), *given)


def test_sequences_share_pages(rng, tpu):
    query_lens, context_lens = [1, 1, 70], [200, 321, 270]
    *floats, block_tables, query_starts = poisoned(rng, query_lens, [321, 1, 1], 90)
    block_tables[1:] = block_tables[0]
    given = arguments((*floats, block_tables, query_starts), query_lens, context_lens)
    check_against_dense(tpu(*given, max_query_len=90), *given)


def test_result_is_bitwise_independent_of_other_sequences(rng, tpu):
    context_lens = [600, 70, 1, 300]
    q, keys, values, block_tables, query_starts, query_lens, context_lens = arguments(
        poisoned(rng, [1] * 4, context_lens, 20), [1] * 4, context_lens
    )
    together = tpu(q, keys, values, block_tables, query_starts, query_lens, context_lens, max_query_len=1)
    alone = jnp.array([0, 1, 0, 0], jnp.int32)
    np.testing.assert_array_equal(
        tpu(q, keys, values, block_tables, query_starts, alone, alone * context_lens, max_query_len=1)[query_starts[1]],
        together[query_starts[1]],
    )


@pytest.mark.parametrize("max_query_len", [1, 128])
def test_kernel_is_in_the_program(max_query_len, rng):
    given = arguments(poisoned(rng, [1, 1], [5, 70], 8), [1, 1], [5, 70])
    call = functools.partial(paged_attention, max_query_len=max_query_len)
    with described_tpu():
        for backend in ("tpu", None):
            program = exported(functools.partial(call, backend=backend), *given)
            assert program.count("@tpu_custom_call") == 1
            assert "paged_attention" in program
        assert "tpu_custom_call" not in exported(functools.partial(call, backend="reference"), *given)
    assert "tpu_custom_call" not in exported(functools.partial(call, backend=None), *given)  # this machine's device is a CPU


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [
        (16, jnp.float32, "q's heads are 16 wide, and it takes multiples of 128"),
        (128, jnp.float16, "q is float16 and keys float16, and it takes float32 or bfloat16 for both"),
    ],
)
def test_unsupported_arguments_are_refused(width, dtype, message, rng, monkeypatch):
    monkeypatch.setattr(backends, "device_kind", lambda: "TPU v5 lite")
    given = arguments(draw(rng, [1], [5], 1, width=width, unseen=0.0), [1], [5], dtype)
    with pytest.raises(NotImplementedError, match=f"backend 'tpu': {message}; backend 'reference' serves it"):
        paged_attention(*given, max_query_len=1, backend="tpu")


def test_tpu_backend_is_refused_on_other_devices(rng):
    given = arguments(poisoned(rng, [1], [5], 1 + 3), [1], [5])
    with pytest.raises(ValueError, match="backend 'tpu' is for TPU v5, TPU v6, TPU7, and the device is 'cpu'"):
        paged_attention(*given, max_query_len=1, backend="tpu")
