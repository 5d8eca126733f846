"""The sampling threshold: the search in XLA against sorting, and arguments that no kernel serves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import top_k_top_p
from kernels_pallas.top_k_top_p import reference

TOP_P = [1.0, 0.3, 0.9, 0.99, 1e-6, 0.5]


def rows(size, rng):
    """Draws scores with ties and forbidden tokens, and parameters.

    Rows have top-k, top-p, both or neither.
    """
    scores = np.round(rng.standard_normal((6, size)) * 4, 1).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    scores[0, 0], scores[1] = 0.0, np.where(scores[1] == 0, -0.0, scores[1])
    top_k = rng.integers(0, 30, 6).astype(np.int32)
    top_k[rng.integers(6)], top_k[rng.integers(6)] = 0, size
    return scores, scores.max(axis=1), top_k, np.array(TOP_P, np.float32)


def check(found, scores, best, top_k, top_p):
    """Compares the tokens that pass with sorting, except where rounding decides."""
    for row, low, k, p in zip(scores, np.asarray(found), top_k, top_p, strict=True):
        ranked = np.sort(row[np.isfinite(row)])[::-1].astype(np.float64)
        inside = ranked[ranked >= ranked[min(int(k), len(ranked)) - 1]] if k else ranked
        weights = np.exp(inside - inside[0])
        before = np.array([weights[inside > x].sum() for x in inside]) / weights.sum()
        if np.abs(before - p).min() > 1e-5:
            np.testing.assert_array_equal(ranked[ranked >= low], inside[(before < p) | (p >= 1)])


@pytest.mark.parametrize("device", ["cpu", "NVIDIA H200"])
@pytest.mark.parametrize("size", [50, 1000])
def test_search_agrees_with_sorting(monkeypatch, device, size):
    monkeypatch.setattr(reference, "device_kind", lambda: device)
    case = rows(size, np.random.default_rng())
    check(jax.jit(lambda *x: reference.sampling_threshold(*x))(*case), *case)


def test_unsupported_arguments_are_refused():
    case = [jnp.zeros((1, 50)), jnp.zeros(1), jnp.zeros(1, jnp.int32), jnp.ones(1)]
    with pytest.raises(NotImplementedError, match="a row has 50 scores, and it takes 128 to 262144"):
        top_k_top_p.sampling_threshold(*case, backend="hopper")
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        top_k_top_p.sampling_threshold(*case, backend="cuda")
