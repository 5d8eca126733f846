"""The gated delta rule as the paper writes it, token by token in float64 numpy, from the raw projections; and inputs for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gated_delta import Layer
from tests.tolerances import relative_rms, rms

DECAYS = {"slow": (-14.0, -7.0), "usual": (-5.0, 0.0), "fast": (0.0, 2.6)}  # log of -g: from 1 - 1e-6 to 1e-6 kept a token


@dataclasses.dataclass
class Case:
    """Arguments of `gated_delta.chunked`, on the device."""

    qkv: jax.Array
    a: jax.Array
    b: jax.Array
    layer: Layer
    memory: jax.Array
    tail: jax.Array
    starts: jax.Array
    lengths: jax.Array

    def arguments(self) -> tuple:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def draw(rng, lengths, *, heads=2, key_heads=None, K=16, V=16, decay="usual", dtype=jnp.float32, gaps=True) -> Case:
    """Sequences of these lengths in one row, in any order and with tokens of nobody between them where `gaps`."""
    S, C = len(lengths), 2 * (key_heads or heads) * K + heads * V
    starts, at = np.zeros(S, int), 0
    for s in rng.permutation(S):
        at += int(rng.integers(0, 5)) if gaps else 0
        starts[s] = at
        at += lengths[s]
    T = -(-(at + 1) // 256) * 256 if gaps else at  # few different sizes: each is compiled
    kept = np.exp(rng.uniform(*DECAYS[decay], (T, heads)))  # -g of every token
    a_log, dt_bias = rng.uniform(-1, 1, heads), rng.uniform(-1, 1, heads)
    rate = kept / np.exp(a_log)
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


def naive(qkv, a, b, layer, memory, tail):
    """One sequence: what each token reads, and the memory after each token (float64 [T, N, V] and [T, N, V, K])."""
    qkv, a, b, memory, tail = (np.asarray(x, np.float64) for x in (qkv, a, b, memory, tail))
    conv, a_log, dt_bias = (np.asarray(x, np.float64) for x in layer)
    (N, V, K), T = memory.shape, len(qkv)
    q, k, v = project(qkv, tail, conv, N, K, V)
    g = -np.exp(a_log) * np.logaddexp(a + dt_bias, 0)
    beta = 1 / (1 + np.exp(-b))
    out, memories = np.zeros((T, N, V)), np.zeros((T, N, V, K))
    for t in range(T):
        memory = np.exp(g[t])[:, None, None] * memory
        error = v[t] - (memory @ k[t][..., None])[..., 0]
        memory = memory + (beta[t][:, None] * error)[..., None] * k[t][:, None]
        out[t], memories[t] = (memory @ q[t][..., None])[..., 0], memory
    return out, memories


def naive_end(case: Case, s: int):
    """`naive` of one sequence of a case, without a memory for every token: what each reads, and the last memory."""
    own = slice(int(case.starts[s]), int(case.starts[s] + case.lengths[s]))
    outs, memory, tail = [], case.memory[s], case.tail[s]
    for start in range(own.start, own.stop, 500):
        part = slice(start, min(start + 500, own.stop))
        out, memories = naive(case.qkv[part], case.a[part], case.b[part], case.layer, memory, tail)
        outs.append(out)
        tail = np.concatenate([np.asarray(tail, np.float64), np.asarray(case.qkv[part], np.float64)])[-3:]
        memory = memories[-1]
    return np.concatenate(outs), memory


def project(qkv, tail, conv, N, K, V):
    """Convolution, SiLU, heads and normalisation; float64."""
    window = np.concatenate([tail, qkv])
    linear = sum(window[i : i + len(qkv)] * conv[:, i] for i in range(conv.shape[1]))
    x = linear / (1 + np.exp(-linear))
    q, k, v = np.split(x, [(x.shape[1] - N * V) // 2, x.shape[1] - N * V], axis=1)
    q, k = (y.reshape(len(x), y.shape[1] // K, K) for y in (q, k))
    q, k = (np.repeat(y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6), N // y.shape[1], axis=1) for y in (q, k))
    return q * K**-0.5, k, v.reshape(len(x), N, V)


def gated_norm(x, z, weight, eps):
    """`x / rms(x) * w * silu(z)`, float64."""
    x, z, weight = (np.asarray(y, np.float64) for y in (x, z, weight))
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight * z / (1 + np.exp(-z))


def sequences(case: Case):
    """For each sequence: (its tokens, what each reads, the memory after each)."""
    for s, (start, length) in enumerate(zip(np.asarray(case.starts), np.asarray(case.lengths), strict=True)):
        own = slice(int(start), int(start + length))
        yield own, *naive(case.qkv[own], case.a[own], case.b[own], case.layer, case.memory[s], case.tail[s])


def usual_output(expected) -> float:
    """Root mean square of what all tokens of a case's `sequences` read. A single token's may be far smaller, where its query
    hardly meets its key: a product of bfloat16 numbers that cancel has the error of its terms."""
    return rms(np.concatenate([out for _, out, _ in expected]))


def gate_terms(case: Case, a_bar):
    """Per head, the sizes of the terms that the gradients of `a_log` and `dt_bias` are sums of, from that of `a`; float64."""
    x, a_bar = (np.asarray(y, np.float64) for y in (case.a, a_bar))
    x = x + np.asarray(case.layer.dt_bias, np.float64)
    rates = np.logaddexp(x, 0) * (1 + np.exp(-x))  # d(g)/d(a_log) over d(g)/d(a)
    return np.abs(a_bar * rates).sum(axis=0), np.abs(a_bar).sum(axis=0)


def worst_gradient(case: Case, found, expected):
    """The largest error of gradients of `chunked`'s first eight arguments, and whose it is: relative RMS, but for sums over all
    tokens, which may come out near zero, relative to the sizes of what they add up."""
    names = ("qkv", "a", "b", "conv", "a_log", "dt_bias", "memory", "tail")
    errors = {name: relative_rms(x, y) for name, x, y in zip(names, found, expected, strict=True)}
    for name, size in zip(("a_log", "dt_bias"), gate_terms(case, expected[1]), strict=True):
        x, y = (np.asarray(bars[names.index(name)], np.float64) for bars in (found, expected))
        errors[name] = np.max(np.abs(x - y) / size)
    return max((error, name) for name, error in errors.items())
