"""The trainer's backend reaches every operation of a step: text layers, their gradients and the vision tower.

A described device is enough: the step is traced for it and not compiled.
"""

import contextlib
from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from kernels_pallas.backends import HOPPER, MIN_JAX_FOR_HOPPER, REFERENCE, TPU
from minicpmv46_jax import model
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.train import bench, make_step, new_state
from minicpmv46_jax.train.settings import Settings
from tests.released import released_config

KERNELS = {"pallas_call", "core_map", "mpmd_map", "call_exported"}  # the primitives of Pallas kernels
needs_mosaic = pytest.mark.skipif(jax.__version_info__ < MIN_JAX_FOR_HOPPER, reason="the Hopper kernels need a newer Mosaic GPU")
H200 = {"device_kind": "NVIDIA H200", "num_cores": 132, "platform": "gpu"}
V5E = {"device_kind": "TPU v5 lite", "num_cores": 1, "platform": "tpu"}


@contextlib.contextmanager
def described(description):
    """Traces programs for a device of another machine, and forgets the traces."""
    device = jax.sharding.AbstractDevice(**description)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)):
        yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def step_primitives():
    """Returns a function that counts the primitives of a step: (backend, pictures) -> Counter.

    The model has the released widths.
    """
    config = bench.cut(ModelConfig.from_dict(released_config()), 1)
    params = model.parameter_shapes(config)
    optimizer = optax.sgd(1e-3)

    def trace(backend, pictures=True):
        batch = bench.make_batch(config, 1, 1024, pictures)
        state = jax.eval_shape(lambda params: new_state(params, jax.tree.map(lambda x: None, params), optimizer), params)
        step = make_step(config, optimizer, dtype=jnp.bfloat16, backend=backend)
        counts = Counter()
        count(jax.make_jaxpr(step)(state, batch).jaxpr, counts)
        return counts

    return trace


def count(jaxpr, counts):
    """Counts the primitives of a jaxpr and of all jaxprs inside it, without looking into kernels."""
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        if equation.primitive.name not in KERNELS:
            for inner in jaxprs_in_params(equation.params):
                count(inner, counts)


def kernels(counts):
    return sum(counts[name] for name in KERNELS)


@pytest.mark.parametrize("description", [pytest.param(H200, marks=needs_mosaic), V5E], ids=["H200", "v5e"])
def test_a_step_with_the_reference_has_no_kernel(description, step_primitives):
    with described(description):
        assert kernels(step_primitives(REFERENCE)) == 0
        assert kernels(step_primitives(None)) > 0


@needs_mosaic
@pytest.mark.parametrize("backend", [HOPPER, "gpu"])
def test_hopper_and_its_alias_select_the_kernels_of_every_operation(backend, step_primitives):
    with described(H200):
        text, both = (kernels(step_primitives(backend, pictures)) for pictures in (False, True))
        assert 0 < text < both == kernels(step_primitives(None))


def test_a_step_refuses_a_backend_that_an_operation_lacks(step_primitives):
    with described(V5E), pytest.raises(ValueError, match="backend is 'tpu', and this operation has"):
        step_primitives(TPU, pictures=False)


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("", contextlib.nullcontext()),
        (REFERENCE, contextlib.nullcontext()),
        (HOPPER, contextlib.nullcontext()),
        ("gpu", contextlib.nullcontext()),
        (TPU, contextlib.nullcontext()),
        ("cuda", pytest.raises(ValueError, match=r"run.backend is 'cuda', expected one of .*reference, hopper, tpu, gpu")),
    ],
)
def test_settings_take_the_backends_names(backend, expected):
    run = {"folder": "r", "steps": 1, "backend": backend}
    with expected:
        tables = {"model": {"source": "m"}, "data": {"files": ["a"]}, "batch": {"rows": 1, "tokens": 64}, "run": run}
        assert Settings.from_dict(tables).run.backend == backend
