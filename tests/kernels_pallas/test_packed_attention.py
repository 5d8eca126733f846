"""Packed attention against dense attention of each view alone, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.packed_attention import packed_attention, window_attention
from tests.tolerances import FLOAT32_ONE_OP, relative_rms

attention = jax.jit(packed_attention, static_argnames="longest")


def alone(q, k, v):
    scores = np.einsum("qnh,knh->nqk", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nqk,knh->qnh", weights / weights.sum(-1, keepdims=True), v)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_each_view_attends_within_itself(lengths, seed):
    rng = np.random.default_rng(seed)
    row, slots, total = 256, 8, sum(lengths)
    q, k, v = rng.standard_normal((3, row, 2, 12)).astype(np.float32)
    v[total:] = 1e30  # rows behind the last view must not affect any result
    starts, sizes = np.full(slots, row, np.int32), np.zeros(slots, np.int32)
    starts[: len(lengths)], sizes[: len(lengths)] = np.cumsum([0, *lengths[:-1]]), lengths
    out = attention(*map(jnp.asarray, (q, k, v, starts, sizes)), longest=40)
    for start, size in zip(starts, lengths, strict=False):
        view = slice(start, start + size)
        assert relative_rms(out[view], alone(*(x[view].astype(np.float64) for x in (q, k, v)))) < FLOAT32_ONE_OP
    assert not np.asarray(out[total:]).any()


def test_gradients_stay_inside_a_view():
    q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 10, 2, 4)), jnp.float32)
    starts, sizes = jnp.array([0, 4, 10]), jnp.array([4, 6, 0])
    gradient = jax.grad(lambda v: packed_attention(q, k, v, starts, sizes, longest=8)[:4].sum())(v)
    assert jnp.isfinite(gradient).all()
    assert (gradient[4:] == 0).all()
    assert (gradient[:4] != 0).all()


def test_windows_are_views_of_one_length():
    q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 12, 2, 4)), jnp.float32)
    starts = jnp.arange(0, 12, 4, dtype=jnp.int32)
    expected = packed_attention(q, k, v, starts, jnp.full(3, 4, jnp.int32), longest=4)
    assert relative_rms(window_attention(q, k, v, window=4), expected) < FLOAT32_ONE_OP
    with pytest.raises(ValueError, match="q has 12 rows, expected a multiple of the window, 5"):
        window_attention(q, k, v, window=5)


def test_mixed_dtypes_are_refused():
    q, one = jnp.zeros((3, 2, 4)), jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match="q is float32, k float32 and v bfloat16, expected one dtype"):
        packed_attention(q, q, q.astype(jnp.bfloat16), one, one, longest=3)
