"""Muon orthogonalises the updates of matrices and leaves other parameters to the other optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convert.demo.muon import MOMENTUM, is_matrix, muon, orthogonalise, orthogonalise_updates


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("rows, columns", [(32, 32), (24, 64), (64, 24)])
def test_orthogonalise_keeps_directions_and_sets_singular_values_to_one(rows, columns):
    x = drawn(3, rows, columns)
    u, _, v = np.linalg.svd(np.asarray(x), full_matrices=False)
    y = np.asarray(orthogonalise(x))
    assert y.dtype == np.float32
    values = np.linalg.svd(y, compute_uv=False)
    assert values.min() > 0.3 and values.max() < 1.3
    along = np.einsum("nij,nir,nrj->nr", y, u, v)  # projections on x's singular directions
    assert np.linalg.norm(y - np.einsum("nr,nir,nrj->nij", along, u, v)) < 0.05 * np.linalg.norm(y)


def test_step_size_ignores_gradient_scale_and_grows_for_tall_matrices():
    x = {"a": drawn(32, 16), "b": drawn(16, 32, seed=1), "c": drawn(32, 16, seed=2)}
    y = orthogonalise_updates(x)
    assert jax.tree.map(jnp.shape, y) == jax.tree.map(jnp.shape, x)
    for name, z in orthogonalise_updates(jax.tree.map(lambda leaf: leaf / 1024, x)).items():
        np.testing.assert_allclose(z, y[name], atol=0.02)
    np.testing.assert_allclose(y["c"], orthogonalise(x["c"][None])[0] * 2**0.5, atol=0.02)
    np.testing.assert_allclose(y["b"], orthogonalise(x["b"][None])[0], atol=0.02)


def test_muon_updates_matrices_only():
    params = {"text": {"embed": {"weight": drawn(40, 20)}, "layers": [{"mlp": {"weight": drawn(20, 20), "bias": drawn(20)}}]}}
    grads = jax.tree.map(lambda x: 0.1 * x + 1.0, params)
    optimizer = muon(0.5, 0.0, optax.sgd(2.0))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    gradient = grads["text"]["layers"][0]["mlp"]["weight"]
    expected = -0.5 * orthogonalise(((1 + MOMENTUM) * gradient)[None])[0]
    np.testing.assert_allclose(updates["text"]["layers"][0]["mlp"]["weight"], expected, atol=0.02)
    np.testing.assert_allclose(
        updates["text"]["layers"][0]["mlp"]["bias"], -2.0 * grads["text"]["layers"][0]["mlp"]["bias"], rtol=1e-6
    )
    np.testing.assert_allclose(updates["text"]["embed"]["weight"], -2.0 * grads["text"]["embed"]["weight"], rtol=1e-6)


def test_is_matrix():
    assert is_matrix(("text", "layers", 0, "mlp", "up_proj", "weight"), jnp.zeros((32, 32)))
    assert not is_matrix(("text", "layers", 0, "mixer", "conv"), jnp.zeros((384, 4)))
    assert not is_matrix(("vision", "patch_embed", "weight"), jnp.zeros((192, 588)))
    assert not is_matrix(("vision", "layers", 0, "norm1", "weight"), jnp.zeros(192))
