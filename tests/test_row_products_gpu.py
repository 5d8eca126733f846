"""Products of rows against float64; the kernel for one row interpreted, what it refuses, and that it is in the program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.row_products import added_product, gpu, normed_products, reference, swiglu_product
from tests.mosaic_interpreted import product
from tests.test_gated_delta_gpu import described_gpu, exported, needs_mosaic
from tests.tolerances import FLOAT32_ONE_OP, ROW_PRODUCTS, relative_rms

EPS = 1e-6


def truth(x, norm, weights):
    """The normalised row, rounded to its dtype as the checkpoint's own code does, times each matrix, in float64."""
    x64, norm64 = np.asarray(x, np.float64), np.asarray(norm, np.float64)
    normed = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + EPS) * (1 + norm64)
    normed = np.asarray(jnp.asarray(normed, x.dtype), np.float64)
    return [normed @ np.asarray(w, np.float64).T for w in weights]


def drawn(rng, dtype, *shapes):
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def check(rng, dtype, rows, inputs, outputs, tolerance, module):
    """Every operation, on fresh numbers."""
    x, norm, *weights = drawn(rng, dtype, (rows, inputs), (inputs,), *((n, inputs) for n in outputs))
    found = jax.jit(functools.partial(module.normed_products, eps=EPS))(x, norm, weights=weights)
    for y, expected in zip(found, truth(x, norm, weights), strict=True):
        assert y.dtype == dtype
        assert relative_rms(y, expected) < tolerance

    both = weights[0] / inputs**0.5, weights[0][::-1] / inputs**0.5
    gate, up = truth(x, norm, both)
    inner = jax.jit(functools.partial(module.swiglu_product, eps=EPS))(x, norm, gate=both[0], up=both[1])
    assert relative_rms(inner, gate / (1 + np.exp(-gate)) * up) < tolerance

    (residual,) = drawn(rng, dtype, (rows, outputs[0]))
    added = jax.jit(module.added_product)(x, weights[0], residual)
    expected = np.asarray(residual, np.float64) + np.asarray(x, np.float64) @ np.asarray(weights[0], np.float64).T
    assert relative_rms(added, expected) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, FLOAT32_ONE_OP), (jnp.bfloat16, ROW_PRODUCTS)])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_reference_follows_float64(rng, rows, dtype, tolerance):
    check(rng, dtype, rows, 128, (64, 24, 16), tolerance, reference)


@needs_mosaic
def test_the_kernel_follows_float64(rng, monkeypatch):
    monkeypatch.setattr(gpu, "accumulate", lambda total, a, b: total + product(a, b))
    monkeypatch.setattr(gpu, "PROCESSORS", 8)  # wide tiles and narrow ones in one call
    with plgpu.force_gpu_interpret_mode():
        for inputs in (256, 384):
            check(rng, jnp.bfloat16, 1, inputs, (64, 24, 16), ROW_PRODUCTS, gpu)


def like(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@needs_mosaic
def test_the_kernel_is_in_the_program():
    x, norm, inner = like(1, 1024), like(1024), [like(3584, 1024)] * 2
    operations = [
        (
            lambda backend: lambda *a: normed_products(*a[:2], EPS, a[2:], backend=backend),
            (x, norm, like(6144, 1024), like(16, 1024)),
        ),
        (lambda backend: lambda *a: swiglu_product(*a[:2], EPS, *a[2:], backend=backend), (x, norm, *inner)),
        (lambda backend: functools.partial(added_product, backend=backend), (like(1, 3584), like(1024, 3584), x)),
    ]
    with described_gpu():
        for operation, arguments in operations:
            for backend in ("gpu", None):
                assert "row_products" in exported(operation(backend), *arguments)
        assert "mosaic_gpu" not in exported(added_product, like(2, 3584), like(1024, 3584), like(2, 1024))  # two rows


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (like(2, 256), like(64, 256), "x has 2 rows, and it takes 1"),
        (like(1, 200), like(64, 200), "x has 200 inputs, and it takes multiples of 128 up to 6656"),
        (like(1, 256), like(30, 256), "the weights have 30 outputs, and it takes multiples of 8"),
        (like(1, 256, dtype=jnp.float32), like(64, 256), "x is float32 and the weights bfloat16, and it takes bfloat16 for all"),
    ],
)
def test_what_the_kernel_does_not_serve_is_refused(x, weight, message):
    with pytest.raises(NotImplementedError, match=f"backend 'gpu': {message}; backend 'reference' serves it"):
        jax.eval_shape(functools.partial(added_product, backend="gpu"), x, weight, like(x.shape[0], weight.shape[0]))


def test_matrices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"a weight is \(64, 128\), and the rows have 256 inputs"):
        added_product(jnp.zeros((1, 256)), jnp.zeros((64, 128)), jnp.zeros((1, 64)))
    with pytest.raises(ValueError, match=r"gate is \(64, 128\) and up \(32, 128\), expected them alike"):
        swiglu_product(jnp.zeros((1, 128)), jnp.zeros(128), EPS, jnp.zeros((64, 128)), jnp.zeros((32, 128)))
