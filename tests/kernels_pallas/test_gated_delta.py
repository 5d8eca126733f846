"""The gated delta rule's reference against the naive recurrence in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import backends, gated_delta
from kernels_pallas.backends import Implementation
from tests.kernels_pallas import gated_delta_truth as truth
from tests.tolerances import GATED_DELTA, relative_rms
from tests.variants import in_full

chunked = jax.jit(functools.partial(gated_delta.chunked, backend="reference"))
recurrent = jax.jit(functools.partial(gated_delta.recurrent, backend="reference"), static_argnames="eps")

LENGTHS = [0, 1, 2, 3, 63, 64, 65, 128, 150, 200]


@pytest.mark.parametrize("decay", ["slow", "fast", *in_full("usual")])
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.sampled_from(LENGTHS), min_size=3, max_size=3), seed=st.integers(0, 2**31))
def test_chunked_matches_recurrence(decay, lengths, seed):
    case = truth.draw(np.random.default_rng(seed), lengths, heads=4, key_heads=2, K=16, V=24, decay=decay)
    found = chunked(*case.arguments())
    for s, (own, out, states) in enumerate(truth.sequences(case)):
        end = states[-1] if lengths[s] else case.recurrent_state[s]
        assert relative_rms(found.recurrent_state[s], end) < GATED_DELTA["reference"]
        conv_state = np.concatenate([case.conv_state[s], case.qkv[own]])[-3:]
        np.testing.assert_array_equal(found.conv_state[s], conv_state)
        if lengths[s]:
            assert relative_rms(found.out[own], out) < GATED_DELTA["reference"]


def test_snapshots_match_states_at_chunk_ends():
    lengths = [200, 0, 128, 70]
    case = truth.draw(np.random.default_rng(7), lengths)
    requested = [(0, 1), (2, 2), (0, 3), (3, 1), (0, 4), (1, 1), (2, 0)]  # the last three chunks do not exist
    found = chunked(*case.arguments(), jnp.asarray(requested, jnp.int32))
    expected = list(truth.sequences(case))
    for i, (s, chunks) in enumerate(requested[:4]):
        own, _, states = expected[s]
        end = 64 * chunks
        assert relative_rms(found.snapshots[i], states[end - 1]) < GATED_DELTA["reference"]
        np.testing.assert_array_equal(found.snapshot_conv_states[i], case.qkv[own][end - 3 : end])
    assert not np.asarray(found.snapshots[4:]).any()
    assert not np.asarray(found.snapshot_conv_states[4:]).any()


def test_prompt_split_at_chunk_boundary_is_bit_exact():
    case = truth.draw(np.random.default_rng(1), [256], gaps=False)
    whole = chunked(*case.arguments(), jnp.array([[0, 2]], jnp.int32))
    qkv, a, b, layer, *_ = case.arguments()
    start, length = jnp.zeros(1, jnp.int32), jnp.full(1, 128, jnp.int32)
    first = chunked(qkv[:128], a[:128], b[:128], layer, case.recurrent_state, case.conv_state, start, length)
    second = chunked(qkv[128:], a[128:], b[128:], layer, first.recurrent_state, first.conv_state, start, length)
    np.testing.assert_array_equal(first.recurrent_state, whole.snapshots)
    np.testing.assert_array_equal(first.conv_state, whole.snapshot_conv_states)
    np.testing.assert_array_equal(jnp.concatenate([first.out, second.out]), whole.out)
    np.testing.assert_array_equal(second.recurrent_state, whole.recurrent_state)


def step_inputs(rng, rows, tokens, slots, *, heads=4, K=16, V=24, decay="usual", dtype=jnp.float32):
    """Returns `recurrent`'s inputs for `rows` sequences of `tokens` tokens in random slots."""
    case = truth.draw(rng, [tokens] * rows, heads=heads, K=K, V=V, decay=decay, dtype=dtype, gaps=False)
    order = np.argsort(np.asarray(case.query_starts))  # the row holds the sequences in another order than the batch
    qkv, a, b = (x.reshape(rows, tokens, -1) for x in (case.qkv, case.a, case.b))
    spare = truth.draw(rng, [1] * slots, heads=heads, K=K, V=V, dtype=dtype)
    z = jnp.asarray(rng.standard_normal((rows, tokens, heads, V)), dtype)
    norm = jnp.asarray(rng.standard_normal(V), dtype)
    slot = rng.permutation(slots)[:rows]
    recurrent_state = spare.recurrent_state.at[slot].set(case.recurrent_state[order])
    conv_state = spare.conv_state.at[slot].set(case.conv_state[order])
    return qkv, a, b, z, case.layer, norm, recurrent_state, conv_state, jnp.asarray(slot, jnp.int32)


def expected_step(qkv, a, b, z, layer, norm, recurrent_state, conv_state, slot, keep, eps):
    """Yields each row's outputs and its states after `keep` tokens, float64."""
    for r, s in enumerate(np.asarray(slot)):
        out, states = truth.naive(qkv[r], a[r], b[r], layer, recurrent_state[s], conv_state[s])
        end = states[keep[r] - 1] if keep[r] else np.asarray(recurrent_state[s])
        yield truth.gated_norm(out, z[r], norm, eps), end, np.concatenate([conv_state[s], qkv[r]])[keep[r] : keep[r] + 3]


@pytest.mark.parametrize("decay", truth.DECAYS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_recurrent_matches_recurrence_and_keeps_requested_tokens(decay, tokens):
    rng = np.random.default_rng([tokens, len(decay)])
    *inputs, slot = step_inputs(rng, 5, tokens, 8, decay=decay)
    slot, idle = slot.at[2].set(-1), 2
    keep = rng.integers(0, tokens + 1, 5)
    out, recurrent_state, conv_state = recurrent(*inputs[:6], 1e-6, *inputs[6:], slot, jnp.asarray(keep, jnp.int32))
    untouched = np.setdiff1d(np.arange(8), np.asarray(slot))
    for r, expected in enumerate(expected_step(*inputs, slot, keep, 1e-6)):
        if r == idle:
            assert not np.asarray(out[r]).any()
            continue
        for found, value in zip((out[r], recurrent_state[slot[r]], conv_state[slot[r]]), expected, strict=True):
            assert relative_rms(found, value) < GATED_DELTA["reference"]
    np.testing.assert_array_equal(recurrent_state[untouched], inputs[6][untouched])
    np.testing.assert_array_equal(conv_state[untouched], inputs[7][untouched])


def test_rejected_drafts_do_not_change_states():
    *inputs, slot = step_inputs(np.random.default_rng(3), 3, 4, 4)
    qkv, a, b, z, layer, norm, recurrent_state, conv_state = inputs
    keep = jnp.array([2, 0, 4], jnp.int32)
    drafted = recurrent(qkv, a, b, z, layer, norm, 1e-6, recurrent_state, conv_state, slot, keep)
    for r in range(3):
        one_by_one, own = (recurrent_state, conv_state), slot[r : r + 1]
        for t in range(int(keep[r])):
            token = (x[r : r + 1, t : t + 1] for x in (qkv, a, b, z))
            _, *one_by_one = recurrent(*token, layer, norm, 1e-6, *one_by_one, own, jnp.ones(1, jnp.int32))
        np.testing.assert_array_equal(drafted[1][own], one_by_one[0][own])
        np.testing.assert_array_equal(drafted[2][own], one_by_one[1][own])


def test_gradients_match_finite_differences():
    case = truth.draw(np.random.default_rng(3), [70, 40], heads=1, K=4, V=4)
    *continuous, starts, lengths = case.arguments()

    @jax.jit
    def loss(continuous):
        found = gated_delta.chunked(*continuous, starts, lengths, backend="reference")
        return jnp.sum(found.out**2) + jnp.sum(jnp.sin(found.recurrent_state))

    gradient = jax.jit(jax.grad(loss))(continuous)
    rng = np.random.default_rng(4)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), continuous)
    analytic = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
    step = 1e-2
    ahead, behind = (loss(jax.tree.map(lambda x, d, s=s: x + s * d, continuous, direction)) for s in (step, -step))
    assert float(analytic) == pytest.approx(float((ahead - behind) / (2 * step)), rel=2e-2)


def test_invalid_arguments_raise_value_error():
    case = truth.draw(np.random.default_rng(0), [3])
    with pytest.raises(ValueError, match="backend is 'cuda', and this operation has 'reference'"):
        gated_delta.chunked(*case.arguments(), backend="cuda")
    layer = case.layer._replace(conv=case.layer.conv[:-1])
    narrow = dataclasses.replace(case, qkv=case.qkv[:, :-1], layer=layer, conv_state=case.conv_state[..., :-1])
    with pytest.raises(ValueError, match=r"qkv has 95 channels, expected 2 x key heads x 16 \+ 2 x 16"):
        gated_delta.chunked(*narrow.arguments())


def test_backend_none_falls_back_and_named_backend_raises():
    def select(backend, reason=None):
        return backends.dispatch(backend, {"reference": Implementation(min), "hopper": Implementation(max, reason)})

    assert select(None) is min  # this machine has no such chip
    assert select("reference") is min
    with pytest.raises(ValueError, match=r"backend 'hopper' is for NVIDIA H100.* and the device is 'cpu'"):
        select("hopper")
    with pytest.raises(NotImplementedError, match="K is 16, and it takes 128; backend 'reference' serves it"):
        select("hopper", "K is 16, and it takes 128")


def test_gpu_is_an_alias_of_hopper(monkeypatch):
    monkeypatch.setattr(backends, "device_kind", lambda: "NVIDIA H200")
    implementations = {"reference": Implementation(min), "hopper": Implementation(max)}
    assert backends.dispatch("gpu", implementations) is backends.dispatch(None, implementations) is max
