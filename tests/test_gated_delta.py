"""The gated delta rule against the naive recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import gated_delta
from tests.tolerances import relative_rms

# float32 against float64 over the worst decays and lengths drawn here. Seen: up to 2e-6 recurrent; the chunked form subtracts
# cumulated logs of the decay, whose rounding the exponential returns as a relative error: up to 1e-5 at decays of 1e-6 a token.
RECURRENT, CHUNKED = 5e-6, 3e-5

recurrent, chunked = jax.jit(gated_delta.recurrent), jax.jit(gated_delta.chunked)


def naive(q, k, v, g, beta, state):
    """The recurrence as the paper writes it, one token at a time, float64."""
    q, k, v, g, beta, state = (np.asarray(x, np.float64) for x in (q, k, v, g, beta, state))
    out = np.zeros(v.shape)
    for t in range(q.shape[1]):
        state = np.exp(g[:, t, :, None, None]) * state
        error = v[:, t] - np.einsum("bnk,bnkv->bnv", k[:, t], state)
        state = state + np.einsum("bn,bnk,bnv->bnkv", beta[:, t], k[:, t], error)
        out[:, t] = np.einsum("bnk,bnkv->bnv", q[:, t], state)
    return out, state


def draw(rng, B, T, N, K, V, log_decay):
    unit = rng.standard_normal((2, B, T, N, K))
    q, k = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    g = -np.exp(rng.uniform(*log_decay, (B, T, N)))
    tensors = (
        q * K**-0.5,
        k,
        rng.standard_normal((B, T, N, V)),
        g,
        rng.uniform(0, 1, (B, T, N)),
        rng.standard_normal((B, N, K, V)),
    )
    return [np.asarray(x, np.float32) for x in tensors]


DECAYS = {"slow": (-14, -7), "usual": (-5, 0), "fast": (0, 2.6)}  # from 1 - 1e-6 to 1e-6 kept a token


@pytest.mark.parametrize("decay", DECAYS)
@settings(max_examples=12, deadline=None)
@given(T=st.sampled_from([1, 2, 63, 64, 65, 128, 150, 200]), seed=st.integers(0, 2**31))
def test_both_forms_follow_the_recurrence(decay, T, seed):
    inputs = draw(np.random.default_rng(seed), 2, T, 2, 16, 24, DECAYS[decay])
    expected_out, expected_state = naive(*inputs)
    for form, tolerance in ((recurrent, RECURRENT), (chunked, CHUNKED)):
        out, state = form(*map(jnp.asarray, inputs))
        assert relative_rms(out, expected_out) < tolerance
        assert relative_rms(state, expected_state) < tolerance


def test_a_prompt_cut_on_a_chunk_is_the_same_to_the_bit():
    q, k, v, g, beta, state = map(jnp.asarray, draw(np.random.default_rng(1), 1, 256, 2, 16, 16, DECAYS["usual"]))
    form = jax.jit(gated_delta.chunked)
    whole, end = form(q, k, v, g, beta, state)
    cut = 2 * gated_delta.CHUNK
    first, middle = form(q[:, :cut], k[:, :cut], v[:, :cut], g[:, :cut], beta[:, :cut], state)
    second, split_end = form(q[:, cut:], k[:, cut:], v[:, cut:], g[:, cut:], beta[:, cut:], middle)
    np.testing.assert_array_equal(jnp.concatenate([first, second], axis=1), whole)
    np.testing.assert_array_equal(split_end, end)


@pytest.mark.parametrize("form", [gated_delta.recurrent, gated_delta.chunked])
def test_a_token_with_zero_gates_changes_nothing(form):
    q, k, v, g, beta, state = map(jnp.asarray, draw(np.random.default_rng(2), 1, 70, 2, 16, 16, DECAYS["usual"]))
    _, expected = form(q[:, :40], k[:, :40], v[:, :40], g[:, :40], beta[:, :40], state)
    real = (jnp.arange(70) < 40)[None, :, None]
    _, found = form(q, k, v, jnp.where(real, g, 0.0), jnp.where(real, beta, 0.0), state)
    assert relative_rms(found, expected) < 1e-6


@pytest.mark.parametrize("form", [gated_delta.recurrent, gated_delta.chunked])
def test_gradients_agree_with_finite_differences(form):
    inputs = [jnp.asarray(x) for x in draw(np.random.default_rng(3), 1, 70, 1, 4, 4, DECAYS["usual"])]

    def loss(inputs):
        out, state = form(*inputs)
        return jnp.sum(out**2) + jnp.sum(jnp.sin(state))

    gradient = jax.grad(loss)(inputs)
    direction = [jnp.asarray(np.random.default_rng(4).standard_normal(x.shape), jnp.float32) for x in inputs]
    analytic = sum(jnp.vdot(a, b) for a, b in zip(gradient, direction, strict=True))
    step = 1e-2
    ahead, behind = (loss([x + s * d for x, d in zip(inputs, direction, strict=True)]) for s in (step, -step))
    assert float(analytic) == pytest.approx(float((ahead - behind) / (2 * step)), rel=2e-2)


@settings(max_examples=20, deadline=None)
@given(T=st.sampled_from([1, 2, 9]), seed=st.integers(0, 2**31), data=st.data())
def test_conv_is_causal_and_its_tail_joins_blocks(T, seed, data):
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((2, T, 6)).astype(np.float32), rng.standard_normal((6, 4)).astype(np.float32)
    padded = np.concatenate([np.zeros((2, 3, 6)), x.astype(np.float64)], axis=1)
    linear = sum(padded[:, i : i + T] * weight[:, i] for i in range(4))
    expected = linear / (1 + np.exp(-linear))
    cut = data.draw(st.integers(0, T))
    tail = jnp.zeros((2, 3, 6))
    outs = []
    for block in (x[:, :cut], x[:, cut:]):
        real = block.shape[1]
        block = np.concatenate([block, np.full((2, 5, 6), 7.0, np.float32)], axis=1)  # padding must not reach the tail
        out, tail = gated_delta.causal_conv(jnp.asarray(block), jnp.asarray(weight), tail, jnp.full(2, real))
        outs.append(out[:, :real])
    np.testing.assert_allclose(np.concatenate(outs, axis=1), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(tail, padded[:, T : T + 3].astype(np.float32))
