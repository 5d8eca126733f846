"""The Hopper kernels, tested without a Hopper GPU.

The tests check that programs contain the kernels, that unsupported arguments raise, and interpreted results.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import gated_delta, tuning
from kernels_pallas.gated_delta import (
    gpu,
    gpu_backward,
    gpu_chunked,
    gpu_convolve,
    gpu_packed,
    gpu_recurrent,
    gpu_state_scan,
    reference,
)
from kernels_pallas.gated_delta.arguments import ChunkedArguments
from kernels_pallas.gated_delta.packed import convolve_segments
from kernels_pallas.gated_delta.packed import rule as rule_in_xla
from tests.kernels_pallas import gated_delta_truth as truth
from tests.kernels_pallas.mosaic_interpreted import product
from tests.kernels_pallas.test_gated_delta import expected_step, step_inputs
from tests.tolerances import GATED_DELTA, relative_rms

recurrent = functools.partial(gated_delta.recurrent, eps=1e-6)
GRADIENT_KERNELS = tuple(f"gated_delta_{name}" for name in ("scan_backward", "chunk_gradients", "convolution_gradients"))


def gradient(*inputs, backend, **sequences):
    """Returns the gradients of all differentiable arguments of `chunked`."""
    return jax.grad(lambda inputs: gated_delta.chunked(*inputs, **sequences, backend=backend).out.astype(jnp.float32).sum())(
        inputs
    )


needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 has another Mosaic GPU, and no interpreter of it"
)


def described_gpu():
    """Returns a mesh that describes the target GPU; no such device is needed."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device))


def exported(f, *args, **kwargs):
    """Returns the program as a GPU's compiler receives it."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (args, kwargs))
    skip = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    program = jax.export.export(jax.jit(f), platforms=["cuda"], disabled_checks=skip)(*shapes[0], **shapes[1])
    return program.mlir_module()


def step(rng, rows=2, tokens=1, slots=2, **options):
    *inputs, recurrent_state, conv_state, slot = step_inputs(
        rng, rows, tokens, slots, K=128, V=128, dtype=jnp.bfloat16, **options
    )
    return (*inputs,), {
        "recurrent_state": recurrent_state,
        "conv_state": conv_state,
        "slots": slot,
        "keep": jnp.ones(rows, jnp.int32),
    }


@needs_mosaic
def test_program_contains_kernels(rng):
    case = truth.draw(rng, [70], heads=2, K=128, V=128, dtype=jnp.bfloat16)
    inputs, named = step(rng, heads=2)
    operations = [
        (gated_delta.chunked, case.arguments(), {}, ("gated_delta_prepare_chunks", "gated_delta_scan")),
        (recurrent, inputs, named, ("gated_delta_recurrent",)),
        (gradient, case.arguments()[:-2], {"query_starts": case.query_starts, "query_lens": case.query_lens}, GRADIENT_KERNELS),
    ]
    for f, args, kwargs, kernels in operations:
        with described_gpu():
            for backend in ("hopper", None):
                program = exported(functools.partial(f, backend=backend), *args, **kwargs)
                assert all(kernel in program for kernel in kernels)
            assert "mosaic_gpu" not in exported(functools.partial(f, backend="reference"), *args, **kwargs)
        assert "mosaic_gpu" not in exported(functools.partial(f, backend=None), *args, **kwargs)  # this machine's device is a CPU


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"K": 16}, "recurrent_state has heads of 128 values and 16 keys, and it takes 128 and 128"),
        ({"key_heads": 1}, "qkv has 512 channels, and it takes 768: as many key heads as value heads"),
        ({"dtype": jnp.float32}, "qkv is float32, and it takes bfloat16"),
    ],
)
def test_unsupported_arguments_raise(rng, options, message):
    case = truth.draw(rng, [3], **{"heads": 2, "K": 128, "V": 128, "dtype": jnp.bfloat16} | options)
    with pytest.raises(NotImplementedError, match=f"backend 'hopper': {message}; backend 'reference' serves it"):
        gated_delta.chunked(*case.arguments(), backend="hopper")


@needs_mosaic
def test_other_device_raises(rng):
    case = truth.draw(rng, [3], heads=2, K=128, V=128, dtype=jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"backend 'hopper' is for NVIDIA H100.*, and the device is 'cpu'; backend 'reference' runs on it"
    ):
        gated_delta.chunked(*case.arguments(), backend="hopper")


@needs_mosaic
def test_packed_rule_and_gradients_interpreted(rng, monkeypatch):
    """Compares with plain XLA in float32.

    Sequences change inside a chunk and at its edge, and one spans a whole chunk. One row decays quickly.
    """
    T, N = 192, 1

    def draw(*shape):
        return jnp.asarray(rng.standard_normal((2, T, *shape)), jnp.bfloat16)

    channels, cotangent = draw(3 * N * 128), draw(N, 128)
    g = jnp.asarray(-rng.uniform(0, 0.2, (2, T, N)), jnp.float32).at[1].multiply(30)
    beta = jnp.asarray(rng.uniform(0, 1, (2, T, N)), jnp.float32)
    ends = jnp.asarray([[70, 71, 128, 160], [64, 64, 64, 192]])[:, None]
    segments = (jnp.arange(T)[None, :, None] >= ends).sum(axis=-1, dtype=jnp.int32)
    for module in (gpu_packed, gpu_state_scan, gpu_chunked):
        monkeypatch.setattr(module, "product", product)
        if hasattr(module, "accumulate"):
            monkeypatch.setattr(module, "accumulate", lambda total, a, b: total + product(a, b))
    with plgpu.force_gpu_interpret_mode():
        found, pull = jax.vjp(lambda *x: gpu_packed.rule(*x, segments), channels, g, beta)
        found = found, *pull(cotangent)
    plain = functools.partial(rule_in_xla, segments=segments, key_width=128, value_width=128)
    expected, pull = jax.vjp(plain, channels.astype(jnp.float32), g, beta)
    expected = expected, *pull(cotangent.astype(jnp.float32))
    for x, y in zip(found, expected, strict=True):
        for row in range(2):
            assert relative_rms(x[row], y[row]) < GATED_DELTA["gpu bfloat16"]


@needs_mosaic
def test_chunked_and_gradients_interpreted(rng, monkeypatch):
    """Compares with the reference's autodiff; matrix-unit products are replaced by jnp."""
    for module in (gpu_chunked, gpu_backward):
        monkeypatch.setattr(module, "product", product)
        monkeypatch.setattr(module, "accumulate", lambda total, a, b: total + product(a, b))
    case = truth.draw(rng, [70, 0, 64, 3], heads=1, K=128, V=128, dtype=jnp.bfloat16)
    *inputs, layer, recurrent_state, conv_state, query_starts, query_lens = case.arguments()
    inputs, snapshots = (*inputs, *layer, recurrent_state, conv_state), jnp.array([[2, 1], [0, 1], [0, 9]], jnp.int32)
    row = np.arange(len(case.qkv))[:, None]
    own = ((row >= np.asarray(query_starts)) & (row < np.asarray(query_starts + query_lens))).any(axis=1)
    out = jnp.asarray(rng.standard_normal((len(row), 1, 128)) * own[:, None, None], jnp.bfloat16)
    ends, kept = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (recurrent_state.shape, (3, 1, 128, 128)))

    def both(run, *exact):
        results, pull = jax.vjp(lambda *x: run(ChunkedArguments(*x, query_starts, query_lens, snapshots)), *exact)
        return results, pull((out.astype(exact[0].dtype), ends, kept))

    with plgpu.force_gpu_interpret_mode():
        found, grads = both(gpu.chunked, *inputs)
    expected, expected_grads = both(reference.chunked, *(x.astype(jnp.float32) for x in inputs))
    for x, y in zip(found, expected, strict=True):
        x, y = (z[own] if len(z) == len(own) else z for z in (x, y))
        assert relative_rms(x, y) < GATED_DELTA["gpu bfloat16"]
    error, name = truth.worst_gradient_error(case, grads, expected_grads)
    assert error < GATED_DELTA["gpu bfloat16 gradient"], name
    assert not np.asarray(grads[0], np.float32)[~own].any()  # tokens of no sequence
    np.testing.assert_array_equal(grads[6][1], ends[1])  # a sequence without tokens


@needs_mosaic
def test_packed_convolution_and_gradients_interpreted(rng):
    """Compares with plain XLA in float32.

    There are sequences of one and two tokens, and sequences that change beside and at the edge of a block.
    """
    qkv, cotangent = (jnp.asarray(rng.standard_normal((2, 128, 128)), jnp.bfloat16) for _ in range(2))
    conv = jnp.asarray(rng.standard_normal((128, 4)), jnp.bfloat16)
    lengths = [10, 1, 53, 64], [63, 2, 63]
    segments = jnp.asarray([np.repeat(range(len(row)), row) for row in lengths], jnp.int32)
    with plgpu.force_gpu_interpret_mode():
        found, pull = jax.vjp(lambda *x: gpu_convolve.convolve(*x, segments), qkv, conv)
        found = found, *pull(cotangent)
    qkv, conv, cotangent = (x.astype(jnp.float32) for x in (qkv, conv, cotangent))
    expected, pull = jax.vjp(lambda *x: convolve_segments(*x, segments), qkv, conv)
    for x, y in zip(found, (expected, *pull(cotangent)), strict=True):
        assert relative_rms(x, y) < GATED_DELTA["gpu bfloat16"]


@needs_mosaic
def test_program_contains_packed_kernels():
    like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    layer = gated_delta.Layer(like((768, 4)), like((2,)), like((2,)))
    arguments = like((1, 128, 768)), like((1, 128, 2)), like((1, 128, 2)), layer, jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def loss(*arguments, backend):
        return gated_delta.packed(*arguments, 128, 128, backend=backend).astype(jnp.float32).sum()

    with described_gpu():
        for backend in ("hopper", None):
            program = exported(jax.grad(functools.partial(loss, backend=backend)), *arguments)
            for kernel in ("convolve", "convolve_backward", "prepare", "scan_states", "scan_states_backward", "gradients"):
                assert f"gated_delta_{kernel}" in program
        assert "mosaic_gpu" not in exported(functools.partial(loss, backend="reference"), *arguments)
    assert "mosaic_gpu" not in exported(functools.partial(loss, backend=None), *arguments)  # this machine's device is a CPU
    narrow = gated_delta.Layer(like((512, 4)), like((2,)), like((2,)))
    arguments = like((1, 64, 512)), like((1, 64, 2)), like((1, 64, 2)), narrow, jax.ShapeDtypeStruct((1, 64), jnp.int32)
    with pytest.raises(NotImplementedError, match="heads have 64 keys and 128 values, and it takes 128 and 128"):
        jax.eval_shape(lambda *x: gated_delta.packed(*x, 64, 128, backend="hopper"), *arguments)


@needs_mosaic
@pytest.mark.parametrize(("tokens", "processors", "groups", "stages"), [(1, 2, 4, 3), (1, 6, 4, 1), (2, 3, 4, 2), (2, 3, 2, 2)])
def test_recurrent_interpreted(rng, monkeypatch, tokens, processors, groups, stages):
    """Runs several heads per block, with idle rows between them, and one head per block.

    Clusters are not covered, because the interpreter does not support them.
    """
    monkeypatch.setattr(gpu_recurrent, "num_sms", lambda: processors)
    configs = {"hopper": {"any": {"gated_delta_recurrent": [{"groups": groups, "parts": 1, "stages": stages}]}}}
    *inputs, recurrent_state, conv_state, slot = step_inputs(rng, 3, tokens, 4, heads=2, K=128, V=128, dtype=jnp.bfloat16)
    slot, keep = slot.at[1].set(-1), np.array([tokens, 1, 0])
    with tuning.using(configs), plgpu.force_gpu_interpret_mode():
        found = gpu_recurrent.recurrent(
            *inputs[:4], *inputs[4], inputs[5], 1e-6, recurrent_state, conv_state, slot, jnp.asarray(keep, jnp.int32)
        )
    out, new_state, new_conv_state = found
    for r, expected in enumerate(expected_step(*inputs, recurrent_state, conv_state, slot, keep, 1e-6)):
        if r == 1:
            assert not np.asarray(out[r], np.float32).any()
            continue
        rows = out[r], new_state[slot[r]], new_conv_state[slot[r]]
        for what, row, value in zip(("gpu bfloat16", "gpu memory", "gpu memory"), rows, expected, strict=True):
            assert relative_rms(row, value) < GATED_DELTA[what]
