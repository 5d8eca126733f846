"""The gated delta rule as in the paper, token by token in float64 numpy, and random inputs for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gated_delta import Layer
from tests.tolerances import relative_rms, rms

# Range of log(-g): a token keeps between 1 - 1e-6 and 1e-6 of the state.
DECAYS = {"slow": (-14.0, -7.0), "usual": (-5.0, 0.0), "fast": (0.0, 2.6)}


@dataclasses.dataclass
class Case:
    """Arguments of `gated_delta.chunked`, on the device."""

    qkv: jax.Array
    a: jax.Array
    b: jax.Array
    layer: Layer
    recurrent_state: jax.Array
    conv_state: jax.Array
    query_starts: jax.Array
    query_lens: jax.Array

    def arguments(self) -> tuple:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def draw(rng, lengths, *, heads=2, key_heads=None, K=16, V=16, decay="usual", dtype=jnp.float32, gaps=True) -> Case:
    """Returns sequences of these lengths in one row of tokens, in random order.

    With `gaps`, tokens of no sequence lie between the sequences.
    """
    S, C = len(lengths), 2 * (key_heads or heads) * K + heads * V
    starts, at = np.zeros(S, int), 0
    for s in rng.permutation(S):
        at += int(rng.integers(0, 5)) if gaps else 0
        starts[s] = at
        at += lengths[s]
    T = -(-(at + 1) // 256) * 256 if gaps else at  # rounds up, because every size is compiled
    rates = np.exp(rng.uniform(*DECAYS[decay], (T, heads)))  # -g of every token
    a_log, dt_bias = rng.uniform(-1, 1, heads), rng.uniform(-1, 1, heads)
    rate = rates / np.exp(a_log)
    a = np.where(rate > 30, rate, np.log(np.expm1(np.minimum(rate, 30)))) - dt_bias
    return Case(
        jnp.asarray(rng.standard_normal((T, C)), dtype),
        jnp.asarray(a, dtype),
        jnp.asarray(rng.standard_normal((T, heads)) * 2, dtype),
        Layer(*(jnp.asarray(x, jnp.float32).astype(dtype) for x in (rng.standard_normal((C, 4)) / 2, a_log, dt_bias))),
        jnp.asarray(rng.standard_normal((S, heads, V, K)) / np.sqrt(K), jnp.float32),
        jnp.asarray(rng.standard_normal((S, 3, C)), dtype),
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
    )


def naive(qkv, a, b, layer, recurrent_state, conv_state):
    """Returns one sequence's reads and the state after each token (float64 [T, N, V] and [T, N, V, K])."""
    qkv, a, b, recurrent_state, conv_state = (np.asarray(x, np.float64) for x in (qkv, a, b, recurrent_state, conv_state))
    conv, a_log, dt_bias = (np.asarray(x, np.float64) for x in layer)
    (N, V, K), T = recurrent_state.shape, len(qkv)
    q, k, v = project(qkv, conv_state, conv, N, K, V)
    g = -np.exp(a_log) * np.logaddexp(a + dt_bias, 0)
    beta = 1 / (1 + np.exp(-b))
    out, states = np.zeros((T, N, V)), np.zeros((T, N, V, K))
    for t in range(T):
        recurrent_state = np.exp(g[t])[:, None, None] * recurrent_state
        error = v[t] - (recurrent_state @ k[t][..., None])[..., 0]
        recurrent_state = recurrent_state + (beta[t][:, None] * error)[..., None] * k[t][:, None]
        out[t], states[t] = (recurrent_state @ q[t][..., None])[..., 0], recurrent_state
    return out, states


def naive_final(case: Case, s: int):
    """Returns one sequence's reads and its final state, like `naive` but in bounded memory."""
    own = slice(int(case.query_starts[s]), int(case.query_starts[s] + case.query_lens[s]))
    outs, recurrent_state, conv_state = [], case.recurrent_state[s], case.conv_state[s]
    for start in range(own.start, own.stop, 500):
        part = slice(start, min(start + 500, own.stop))
        out, states = naive(case.qkv[part], case.a[part], case.b[part], case.layer, recurrent_state, conv_state)
        outs.append(out)
        conv_state = np.concatenate([np.asarray(conv_state, np.float64), np.asarray(case.qkv[part], np.float64)])[-3:]
        recurrent_state = states[-1]
    return np.concatenate(outs), recurrent_state


def project(qkv, conv_state, conv, N, K, V):
    """Applies convolution, SiLU, the split into heads and normalisation; float64."""
    window = np.concatenate([conv_state, qkv])
    linear = sum(window[i : i + len(qkv)] * conv[:, i] for i in range(conv.shape[1]))
    x = linear / (1 + np.exp(-linear))
    q, k, v = np.split(x, [(x.shape[1] - N * V) // 2, x.shape[1] - N * V], axis=1)
    q, k = (y.reshape(len(x), y.shape[1] // K, K) for y in (q, k))
    q, k = (np.repeat(y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6), N // y.shape[1], axis=1) for y in (q, k))
    return q * K**-0.5, k, v.reshape(len(x), N, V)


def gated_norm(x, z, weight, eps):
    """Returns `x / rms(x) * w * silu(z)`, float64."""
    x, z, weight = (np.asarray(y, np.float64) for y in (x, z, weight))
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight * z / (1 + np.exp(-z))


def sequences(case: Case):
    """Yields (slice of its tokens, reads, state after each token) of each sequence."""
    for s, (start, length) in enumerate(zip(np.asarray(case.query_starts), np.asarray(case.query_lens), strict=True)):
        own = slice(int(start), int(start + length))
        yield own, *naive(case.qkv[own], case.a[own], case.b[own], case.layer, case.recurrent_state[s], case.conv_state[s])


def output_rms(expected) -> float:
    """Returns the root mean square of all tokens' reads in a case's `sequences`.

    A single token's read may be far smaller, where its query is almost orthogonal to its keys. The error of a
    bfloat16 product whose terms cancel is that of its terms.
    """
    return rms(np.concatenate([out for _, out, _ in expected]))


def gate_terms(case: Case, d_a):
    """Returns per head the sizes of the terms that the gradients of `a_log` and `dt_bias` sum up; float64.

    `d_a` is the gradient of `a`.
    """
    x, d_a = (np.asarray(y, np.float64) for y in (case.a, d_a))
    x = x + np.asarray(case.layer.dt_bias, np.float64)
    rates = np.logaddexp(x, 0) * (1 + np.exp(-x))  # d(g)/d(a_log) over d(g)/d(a)
    return np.abs(d_a * rates).sum(axis=0), np.abs(d_a).sum(axis=0)


def worst_gradient_error(case: Case, found, expected):
    """Returns the largest error among the gradients of `chunked`'s first eight arguments, and its name.

    The error is relative RMS. `a_log` and `dt_bias` have gradients that are sums over all tokens and may be
    near zero. Their errors are relative to the sizes of the summed terms.
    """
    names = ("qkv", "a", "b", "conv", "a_log", "dt_bias", "recurrent_state", "conv_state")
    errors = {name: relative_rms(x, y) for name, x, y in zip(names, found, expected, strict=True)}
    for name, size in zip(("a_log", "dt_bias"), gate_terms(case, expected[1]), strict=True):
        x, y = (np.asarray(grads[names.index(name)], np.float64) for grads in (found, expected))
        errors[name] = np.max(np.abs(x - y) / size)
    return max((error, name) for name, error in errors.items())
