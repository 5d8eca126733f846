"""Programs share the lowered kernels that they have in common, and are otherwise unchanged."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import gated_delta
from kernels_pallas.gated_delta import gpu_recurrent
from kernels_pallas.gpu.export_cache import exported_once, shared_lowering
from kernels_pallas.paged_attention import paged_attention
from kernels_pallas.paged_attention.shapes import HEADS, KEY_HEADS, WIDTH
from tests.kernels_pallas.test_gated_delta_gpu import described_gpu, exported, needs_mosaic, step


@pytest.fixture
def written(monkeypatch):
    """Counts how often the step's kernel is lowered."""
    calls, kernel = [], gpu_recurrent._kernel
    monkeypatch.setattr(gpu_recurrent, "_kernel", lambda *refs, **static: (calls.append(1), kernel(*refs, **static))[1])
    return calls


def programs(rng):
    """Returns two programs with a kernel in common, and a third with the same kernel for one more row."""
    found = []
    for rows, factor in ((2, 1), (2, 3), (3, 1)):
        inputs, named = step(rng, rows=rows, slots=3, heads=2)

        def run(*inputs, factor=factor, **named):
            out, recurrent_state, conv_state = gated_delta.recurrent(*inputs, eps=1e-6, **named, backend="hopper")
            return factor * out, recurrent_state, conv_state

        found.append((run, inputs, named))
    return found


def programs_again(drawn):
    """Returns the programs as functions that jax has not traced."""
    return [(lambda *inputs, run=run, **named: run(*inputs, **named), inputs, named) for run, inputs, named in drawn]


def kernels_of(program):
    """Returns the input of the chip's compiler for each kernel."""
    return re.findall(r'module = "(?:[^"\\]|\\.)*"', program)


@needs_mosaic
def test_kernel_is_lowered_once_for_the_same_shapes(rng, written):
    drawn = programs(rng)
    with described_gpu():
        apart = [exported(run, *inputs, **named) for run, inputs, named in drawn]
        assert len(written) == 3
        with shared_lowering():
            together = [exported(run, *inputs, **named) for run, inputs, named in programs_again(drawn)]
        assert len(written) == 3 + 2
        with shared_lowering():  # a new context shares nothing with the one before
            run, inputs, named = programs_again(drawn)[0]
            exported(run, *inputs, **named)
        assert len(written) == 3 + 2 + 1
    for one, other in zip(apart, together, strict=True):
        assert len(kernels_of(one)) == len(kernels_of(other)) == 1
        assert "gated_delta_recurrent" in other
    assert kernels_of(together[0]) == kernels_of(together[1]) != kernels_of(together[2])


@needs_mosaic
def test_static_arguments_give_separate_exports():
    rows, pages = 4, 8
    shape = jax.ShapeDtypeStruct
    pool = shape((pages, 64, KEY_HEADS * WIDTH), jnp.bfloat16)
    numbers = [shape((rows, pages), jnp.int32)] + [shape((rows,), jnp.int32)] * 3
    with described_gpu(), shared_lowering():
        found = [
            exported(
                lambda *x, longest=longest: paged_attention(*x, max_query_len=longest, backend="hopper"),
                shape((rows, HEADS, WIDTH), jnp.bfloat16),
                *(pool, pool, *numbers),
            )
            for longest in (1, rows * 64)
        ]
    assert "paged_attention_decode" in found[0] and "paged_attention_prefill" in found[1]


def test_nothing_is_exported_outside_of_the_context():
    calls = []
    double = exported_once(lambda x, factor: (calls.append(1), x * factor)[1])
    assert double(np.float32(3), 2) == 6 and len(calls) == 1
