"""The Hopper kernel for top-k and top-p on a machine without such a GPU: in the program, and interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.top_k_top_p import gpu
from minicpmv46_jax.config import GenerationConfig
from minicpmv46_jax.generation.decoding import sampling_params
from minicpmv46_jax.generation.options import generation_options
from minicpmv46_jax.generation.sampling import filter_scores
from tests.kernels_pallas.test_gated_delta_gpu import described_gpu, exported, needs_mosaic
from tests.kernels_pallas.test_top_k_top_p import check, rows


@needs_mosaic
@pytest.mark.parametrize("size", [512, 700, 1100])
def test_kernel_interpreted(monkeypatch, size):
    """The interpreter has no clusters, so one block has a row."""
    monkeypatch.setattr(gpu, "PARTS", 1)
    case = rows(size, np.random.default_rng())
    with jax.numpy_rank_promotion("allow"), plgpu.force_gpu_interpret_mode():
        found = jax.jit(lambda *x: gpu.sampling_threshold(*x))(*map(jnp.asarray, case))
    check(found, *case)


@needs_mosaic
def test_sampling_on_hopper_uses_the_kernel():
    options = generation_options(GenerationConfig(), temperature=0.7, top_p=0.8, seed=0)
    scores, wishes = jnp.zeros((1, 1113)), sampling_params([options], [0])
    with described_gpu():
        program = exported(lambda *x: filter_scores(*x), scores, wishes)
    assert "top_k_top_p" in program and "mosaic_gpu_v2" in program
