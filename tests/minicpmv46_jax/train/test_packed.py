"""The two token mixers over packed rows, each against a slower reference: sequences must not mix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import gated_delta
from kernels_pallas.causal_attention import causal_attention, reference
from kernels_pallas.gated_delta.packed import unit_lower_inverse
from minicpmv46_jax.model.batch import PackedBatch
from tests.kernels_pallas import gated_delta_truth as truth
from tests.minicpmv46_jax.train.train_compile import QUICK
from tests.tolerances import FLOAT32_ONE_OP, GATED_DELTA, relative_rms

LENGTHS = [70, 1, 57, 128, 60]  # sequences change inside a chunk and at its edge; padding follows
TOKENS = 384


def segments(lengths, tokens):
    """Returns [1, tokens] sequence numbers 1, 2, ..., and 0 for padding."""
    ends = np.cumsum(lengths)
    index = np.searchsorted(ends, np.arange(tokens), side="right") + 1
    return jnp.asarray(np.where(np.arange(tokens) < ends[-1], index, 0)[None], jnp.int32)


def rule(qkv, a, b, layer, segments, widths):
    return gated_delta.packed(qkv[None], a[None], b[None], layer, segments, *widths)[0]


packed = jax.jit(rule, static_argnames="widths", compiler_options=QUICK)


@pytest.mark.parametrize("decay", truth.DECAYS)
def test_packed_rule_matches_recurrence(decay):
    rng = np.random.default_rng(3)
    case = truth.draw(rng, [TOKENS], heads=4, key_heads=2, K=16, V=24, decay=decay, gaps=False)
    out = packed(case.qkv, case.a, case.b, case.layer, segments(LENGTHS, TOKENS), (16, 24))
    zero_states = np.zeros(case.recurrent_state.shape[1:]), np.zeros(case.conv_state.shape[1:])
    for end, length in zip(np.cumsum(LENGTHS), LENGTHS, strict=True):
        own = slice(end - length, end)
        expected, _ = truth.naive(case.qkv[own], case.a[own], case.b[own], case.layer, *zero_states)
        assert relative_rms(out[own], expected) < GATED_DELTA["reference"]


def test_packed_gradients_match_separate_sequences():
    lengths = [70, 58]
    case = truth.draw(np.random.default_rng(4), lengths, heads=2, K=16, V=16, gaps=False)
    order = np.argsort(np.asarray(case.query_starts))
    row = segments(np.asarray(case.query_lens)[order], 128)
    weights = jnp.asarray(np.random.default_rng(5).standard_normal((128, 2, 16)), jnp.float32)

    def ours(qkv, a, b, layer):
        return (rule(qkv, a, b, layer, row, (16, 16)) * weights).sum()

    def separate(qkv, a, b, layer):
        zero_states = jnp.zeros_like(case.recurrent_state), jnp.zeros_like(case.conv_state)
        out = gated_delta.chunked(qkv, a, b, layer, *zero_states, case.query_starts, case.query_lens, backend="reference").out
        return (out * weights).sum()

    arguments = case.qkv, case.a, case.b, case.layer
    found, expected = (jax.jit(jax.grad(f, (0, 1, 2, 3)), compiler_options=QUICK)(*arguments) for f in (ours, separate))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_rms(one, other) < 2e-5


def test_inverse_is_exact_where_powers_cancel():
    """Inverts the matrix of equal keys, which has ones below the diagonal.

    Its powers reach 1e17. Its inverse has ones on the diagonal and -1 below it.
    """
    ones = np.tril(np.ones((64, 64)), -1)
    random = np.tril(0.3 * np.random.default_rng(0).standard_normal((64, 64)), -1)
    found = jax.jit(unit_lower_inverse)(jnp.asarray([ones, random], jnp.float32))
    np.testing.assert_array_equal(found[0], np.eye(64) - np.eye(64, k=-1))
    assert relative_rms(found[1], np.linalg.inv(np.eye(64) + random)) < 1e-5


def test_partial_chunk_row_raises():
    with pytest.raises(ValueError, match="rows have 65 tokens"):
        layer = gated_delta.Layer(jnp.zeros((96, 4)), jnp.zeros(2), jnp.zeros(2))
        packed(*(jnp.zeros((65, n)) for n in (96, 2, 2)), layer, segments([65], 65), (16, 16))


def test_attention_is_masked_to_own_sequence(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 16)  # four blocks and spans
    q, k, v = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).standard_normal((3, 2, 64, 2, 8)))
    q = jnp.concatenate([q, -q], axis=2)  # four query heads, two key heads
    row = segments([30, 1, 25], 64)
    rows = jnp.concatenate([row, segments([64], 64)])

    def dense(q, k, v):
        same = (rows[:, :, None] == rows[:, None]) & jnp.tril(jnp.ones((1, 64, 64), bool))
        k, v = jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)
        scores = jnp.where(same[:, None], jnp.einsum("rqnh,rknh->rnqk", q, k) * 8**-0.5, -jnp.inf)
        return jnp.einsum("rnqk,rknh->rqnh", jax.nn.softmax(scores), v)

    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 64, 4, 8)), jnp.float32)
    results = [
        jax.jit(jax.value_and_grad(lambda q, k, v, f=f: (f(q, k, v) * weights).sum(), (0, 1, 2)))(q, k, v)
        for f in (functools.partial(causal_attention, segments=rows, backend="reference"), dense)
    ]
    for found, expected in zip(*map(jax.tree.leaves, results), strict=True):
        assert relative_rms(found, expected) < FLOAT32_ONE_OP
    np.testing.assert_array_equal(PackedBatch(row).rope_positions(64)[29:33], [29, 0, 0, 1])
