"""Paged attention against dense attention of each sequence alone, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.paged_attention import PAGE, paged_attention
from tests.tolerances import FLOAT32_ONE_OP, relative_rms

POOL, WIDTH = 48, 12  # pages in all, pages a sequence may have
attention = jax.jit(functools.partial(paged_attention, backend="reference"), static_argnames="max_query_len")


def draw(rng, query_lens, context_lens, row, *, heads=4, key_heads=2, width=16, unseen=1e30):
    """Draws pages in random order.

    Pages and tokens outside of the sequences are `unseen`: keys and values if that is NaN, else only values.
    """
    q = rng.standard_normal((row, heads, width)).astype(np.float32)
    keys, values = rng.standard_normal((2, POOL, PAGE, key_heads * width)).astype(np.float32)
    order, block_tables = rng.permutation(POOL), np.full((len(query_lens), WIDTH), -1, np.int32)
    poisoned = (keys, values) if np.isnan(unseen) else (values,)
    for s, context in enumerate(context_lens):
        pages = -(-context // PAGE)
        block_tables[s, :pages], order = order[:pages], order[pages:]
        for x in poisoned:
            x[block_tables[s, pages - 1], (context - 1) % PAGE + 1 :] = unseen
    for x in poisoned:
        x[order] = unseen
    gaps = rng.integers(0, 4, len(query_lens))
    query_starts = np.cumsum(gaps + np.concatenate([[0], query_lens[:-1]])).astype(np.int32)
    return q, keys, values, block_tables, query_starts


def alone(q, k, v):
    """The queries are the last tokens of [context, K, H]."""
    k, v = (np.repeat(x.astype(np.float64), q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("qnh,knh->nqk", q.astype(np.float64), k) * q.shape[-1] ** -0.5
    first = len(k) - len(q)
    scores[:, np.arange(len(k))[None] > first + np.arange(len(q))[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nqk,knh->qnh", weights / weights.sum(-1, keepdims=True), v)


def check(query_lens, context_lens, seed, row, max_query_len):
    q, keys, values, block_tables, query_starts = draw(np.random.default_rng(seed), query_lens, context_lens, row)
    numbers = (np.array(x, np.int32) for x in (block_tables, query_starts, query_lens, context_lens))
    out = np.asarray(attention(*map(jnp.asarray, (q, keys, values, *numbers)), max_query_len=max_query_len))
    unowned = np.ones(row, bool)
    for s, (start, length, context) in enumerate(zip(query_starts, query_lens, context_lens, strict=True)):
        own = slice(start, start + length)
        unowned[own] = False
        k, v = (x[block_tables[s]].reshape(-1, 2, 16)[:context] for x in (keys, values))
        if length:
            assert relative_rms(out[own], alone(q[own], k, v)) < FLOAT32_ONE_OP
    assert not out[unowned].any()


SEQUENCES = st.tuples(st.sampled_from([0, 1, 3, 63, 64, 65, 150]), st.sampled_from([0, 1, 63, 64, 100, 511, 512, 600]))


@settings(max_examples=25, deadline=None)
@given(sequences=st.lists(SEQUENCES, min_size=3, max_size=3), seed=st.integers(0, 2**31))
def test_prefill_chunks(sequences, seed):
    check([length for length, _ in sequences], [max(a + b, 1) for a, b in sequences], seed, 512, 512)


@settings(max_examples=15, deadline=None)
@given(context_lens=st.lists(st.integers(1, 700), min_size=4, max_size=4), active=st.lists(st.booleans(), min_size=4, max_size=4))
def test_decode(context_lens, active):
    q, keys, values, block_tables, _ = draw(np.random.default_rng(sum(context_lens)), [1] * 4, context_lens, 4)
    query_lens = np.array(active, np.int32)
    seen = np.where(active, context_lens, 0).astype(np.int32)
    out = attention(
        *map(jnp.asarray, (q, keys, values, block_tables, np.arange(4, dtype=np.int32), query_lens, seen)), max_query_len=1
    )
    for s, context in enumerate(context_lens):
        k, v = (x[block_tables[s]].reshape(-1, 2, 16)[:context] for x in (keys, values))
        if active[s]:
            assert relative_rms(out[s : s + 1], alone(q[s : s + 1], k, v)) < FLOAT32_ONE_OP
        else:
            assert not np.asarray(out[s]).any()


def test_result_is_bitwise_independent_of_other_sequences():
    q, keys, values, block_tables, _ = draw(np.random.default_rng(0), [1] * 4, [600, 70, 1, 300], 4)
    arguments = [jnp.asarray(x) for x in (q, keys, values, block_tables, np.arange(4, dtype=np.int32), np.ones(4, np.int32))]
    together = attention(*arguments, jnp.array([600, 70, 1, 300]), max_query_len=1)
    others_gone = attention(*arguments[:5], jnp.array([0, 1, 0, 0]), jnp.array([0, 70, 0, 0]), max_query_len=1)
    np.testing.assert_array_equal(others_gone[1], together[1])


def test_pages_of_another_size_are_refused():
    q, pages, numbers = jnp.zeros((1, 4, 16)), jnp.zeros((2, 32, 32)), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match=r"keys are \(2, 32, 32\), expected pages of 64"):
        paged_attention(q, pages, pages, jnp.zeros((1, 1), jnp.int32), numbers, numbers, numbers, max_query_len=1)


def test_values_must_match_the_keys():
    q, pages, numbers = jnp.zeros((1, 4, 16)), jnp.zeros((2, PAGE, 32)), jnp.zeros(1, jnp.int32)
    values = pages.astype(jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"values are bfloat16 \(2, 64, 32\) and keys float32 \(2, 64, 32\), expected them alike"
    ):
        paged_attention(q, pages, values, jnp.zeros((1, 1), jnp.int32), numbers, numbers, numbers, max_query_len=1)
