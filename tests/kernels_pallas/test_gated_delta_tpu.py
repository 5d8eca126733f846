"""The TPU kernels, interpreted on the CPU, against the naive recurrence in float64.

The interpreter fills unwritten memory with NaN and raises when two accesses race. It runs a copy either when
it starts or when it is awaited; each case names the mode. Inputs are new in each run; a failure prints the
seed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import backends, gated_delta
from tests.kernels_pallas import gated_delta_truth as truth
from tests.kernels_pallas.test_gated_delta import expected_step, step_inputs
from tests.tolerances import GATED_DELTA, relative_rms
from tests.variants import in_full

ARGUMENTS = ("qkv", "a", "b", "conv", "a_log", "dt_bias", "recurrent_state", "conv_state")
MODES = [(jnp.float32, "eager"), (jnp.float32, "on_wait"), (jnp.bfloat16, "on_wait"), (jnp.bfloat16, "eager")]
# The dtypes, and when copies happen. Half of the cases take minutes, and run only in `make test-full`.
HOW = [*MODES[1::2], *in_full(*MODES[::2])]
CASES = [(decay, *how) for decay, how in zip([*truth.DECAYS] * 2, MODES + MODES[2:], strict=True)]
LENGTHS = (0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 190)
draw = functools.partial(truth.draw, heads=2, K=128, V=128)


def tolerance(dtype):
    return GATED_DELTA[f"tpu {jnp.dtype(dtype)}"]


@pytest.mark.parametrize(("decay", "dtype", "mode"), [CASES[0], CASES[2], *in_full(CASES[1], *CASES[3:])])
def test_chunked_matches_recurrence(decay, dtype, mode, rng, tpu):
    lengths = [0, 190, *rng.choice(LENGTHS, 3)]
    case = draw(rng, lengths, decay=decay, dtype=dtype)
    requested = [(1, 2), (0, 1), (1, 3), (1, 1)]  # two of these chunks do not exist or are partial
    found = tpu(gated_delta.chunked, *case.arguments(), jnp.asarray(requested, jnp.int32), mode=mode)
    unowned, expected = np.ones(len(case.qkv), bool), list(truth.sequences(case))
    usual_rms = truth.output_rms(expected) if dtype == jnp.bfloat16 else 0.0
    for s, (own, out, states) in enumerate(expected):
        unowned[own] = False
        if lengths[s]:
            assert relative_rms(found.out[own], out, usual_rms) < tolerance(dtype)
            assert relative_rms(found.recurrent_state[s], states[-1]) < tolerance(dtype)
        else:
            np.testing.assert_array_equal(found.recurrent_state[s], case.recurrent_state[s])
        if s == 1:
            assert relative_rms(found.snapshots[0], states[127]) < tolerance(dtype)
            assert relative_rms(found.snapshots[3], states[63]) < tolerance(dtype)
    assert unowned.any()
    assert not np.asarray(found.out)[unowned].any()
    assert not np.asarray(found.snapshots[1:3]).any()


def test_many_short_sequences_share_tiles(rng, tpu):
    lengths = rng.integers(0, 9, 24)
    case = draw(rng, lengths)
    found = tpu(gated_delta.chunked, *case.arguments())
    expected = np.zeros(found.out.shape)
    for s, (own, out, states) in enumerate(truth.sequences(case)):
        expected[own] = out
        final_state = states[-1] if lengths[s] else case.recurrent_state[s]
        assert relative_rms(found.recurrent_state[s], final_state) < tolerance("float32")
    assert relative_rms(found.out, expected) < tolerance("float32")


@pytest.mark.parametrize("lengths", [[0, 0], [5]])
def test_empty_and_short_sequences(lengths, rng, tpu):
    case = draw(rng, lengths)
    found = tpu(gated_delta.chunked, *case.arguments())
    for s, (own, out, states) in enumerate(truth.sequences(case)):
        final_state = states[-1] if lengths[s] else case.recurrent_state[s]
        assert relative_rms(found.recurrent_state[s], final_state) < tolerance("float32")
        assert not lengths[s] or relative_rms(found.out[own], out) < tolerance("float32")


@pytest.mark.parametrize("dtype", [jnp.float32, *in_full(jnp.bfloat16)])
def test_prompt_split_at_chunk_boundary_is_bit_exact(dtype, rng, tpu):
    case = draw(rng, [200], dtype=dtype)
    start, length = case.query_starts, case.query_lens
    whole = tpu(gated_delta.chunked, *case.arguments(), jnp.array([[0, 2]], jnp.int32))
    first = tpu(gated_delta.chunked, *dataclasses.replace(case, query_lens=length - 72).arguments())
    rest = dataclasses.replace(
        case,
        recurrent_state=first.recurrent_state,
        conv_state=first.conv_state,
        query_starts=start + 128,
        query_lens=length - 128,
    )
    second = tpu(gated_delta.chunked, *rest.arguments())
    np.testing.assert_array_equal(first.recurrent_state, whole.snapshots)
    np.testing.assert_array_equal(first.conv_state, whole.snapshot_conv_states)
    np.testing.assert_array_equal(second.recurrent_state, whole.recurrent_state)
    np.testing.assert_array_equal(first.out + second.out, whole.out)  # each output is zero at the other's tokens


@pytest.mark.parametrize(("dtype", "mode"), HOW)
@pytest.mark.parametrize(("tokens", "idle"), [(1, [0, 2]), (4, [1, 4]), (1, [0, 1, 2, 3, 4])])
def test_recurrent_matches_recurrence_and_keeps_requested_tokens(idle, tokens, dtype, mode, rng, tpu):
    decay = rng.choice(list(truth.DECAYS))
    *inputs, slot = step_inputs(rng, 5, tokens, 8, heads=2, K=128, V=128, decay=decay, dtype=dtype)
    slot = slot.at[jnp.array(idle, jnp.int32)].set(-1)
    keep = rng.integers(0, tokens + 1, 5)
    arguments = *inputs[:6], *inputs[6:], slot, jnp.asarray(keep, jnp.int32)
    out, recurrent_state, conv_state = tpu(recurrent, *arguments, mode=mode)
    untouched = np.setdiff1d(np.arange(8), np.asarray(slot))
    for r, expected in enumerate(expected_step(*inputs, slot, keep, 1e-6)):
        if r in idle:
            assert not np.asarray(out[r]).any()
            continue
        assert relative_rms(out[r], expected[0]) < tolerance(dtype)
        # No bfloat16 product contributes to the state.
        assert relative_rms(recurrent_state[slot[r]], expected[1]) < tolerance("float32")
        np.testing.assert_array_equal(conv_state[slot[r]], expected[2])
    np.testing.assert_array_equal(recurrent_state[untouched], inputs[6][untouched])
    np.testing.assert_array_equal(conv_state[untouched], inputs[7][untouched])


@pytest.mark.parametrize(("decay", "dtype", "mode"), [*CASES[1:3], *in_full(CASES[0])])
def test_gradients_match_reference(decay, dtype, mode, rng, tpu):
    """Compares with the reference's float32 autodiff.

    All outputs, with two snapshots, and all arguments take part.
    """
    case = draw(rng, [int(rng.integers(128, 140)), 0, 65], heads=1, decay=decay, dtype=dtype)
    *arguments, starts, lengths = case.arguments()
    requested = jnp.array([[0, 1], [0, 2], [1, 1]], jnp.int32)  # the last chunk is partial

    def outputs(arguments, **options):
        found = gated_delta.chunked(*arguments, starts, lengths, requested, **options)
        return found.out, found.recurrent_state, found.snapshots, found.conv_state

    cotangents = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in jax.eval_shape(outputs, arguments)]

    def gradients(arguments, backend):
        out, pull = jax.vjp(functools.partial(outputs, backend=backend), arguments)
        return pull(tuple(cotangent.astype(x.dtype) for cotangent, x in zip(cotangents, out, strict=True)))

    found = jax.tree.leaves(tpu(gradients, arguments, mode=mode))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)
    expected = jax.tree.leaves(jax.jit(functools.partial(gradients, backend="reference"))(exact))
    for name, gradient, value, argument in zip(ARGUMENTS, found, expected, jax.tree.leaves(arguments), strict=True):
        assert gradient.dtype == argument.dtype
        # Where a head decays quickly, the gates' gradients come from few pairs of tokens. Their products may
        # all be small by chance, but the error is that of usual products. With cotangents of standard
        # deviation 1, usual gradients have about this norm.
        usual_norm = {"a": 1.0, "a_log": 1.0, "dt_bias": 1.0, "b": 2.0}.get(name, 0.0)
        error = float(jnp.linalg.norm((gradient.astype(jnp.float32) - value).ravel()))
        size = float(jnp.linalg.norm(value.ravel()))
        assert error < GATED_DELTA[f"tpu {jnp.dtype(dtype)} gradient"] * max(size, usual_norm), f"{name}: {error} of {size}"


def recurrent(qkv, a, b, z, layer, norm, recurrent_state, conv_state, slots, keep, backend):
    return gated_delta.recurrent(qkv, a, b, z, layer, norm, 1e-6, recurrent_state, conv_state, slots, keep, backend=backend)


def test_rejected_drafts_do_not_change_states(rng, tpu):
    *inputs, slot = step_inputs(rng, 3, 4, 4, heads=2, K=128, V=128)
    qkv, a, b, z, layer, norm, *start = inputs
    keep = np.array([2, 0, 4])
    _, *drafted = tpu(recurrent, *inputs, slot, jnp.asarray(keep, jnp.int32))
    one_by_one = start
    for t in range(4):
        own = jnp.where(t < keep, slot, -1)
        token = (x[:, t : t + 1] for x in (qkv, a, b, z))
        _, *one_by_one = tpu(recurrent, *token, layer, norm, *one_by_one, own, jnp.ones(3, jnp.int32))
    np.testing.assert_array_equal(drafted[1], one_by_one[1])
    assert relative_rms(drafted[0], one_by_one[0]) < 1e-7
    np.testing.assert_array_equal(drafted[0][slot[1]], start[0][slot[1]])


def described_tpu():
    """Returns a mesh that describes the target TPU; no such device is needed."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device))


def exported(f, *args):
    """Returns the program as a TPU's compiler receives it."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    return jax.export.export(jax.jit(f), platforms=["tpu"])(*shapes).mlir_module()


def test_program_contains_kernels(rng):
    case = draw(rng, [70]).arguments()
    step = *step_inputs(rng, 2, 1, 2, heads=2, K=128, V=128), jnp.ones(2, jnp.int32)
    for name, f, args in (("chunked", gated_delta.chunked, case), ("recurrent", recurrent, step)):
        with described_tpu():
            for backend in ("tpu", None):
                program = exported(functools.partial(f, backend=backend), *args)
                assert program.count("@tpu_custom_call") == 1
                assert f"gated_delta_{name}" in program
            assert "tpu_custom_call" not in exported(functools.partial(f, backend="reference"), *args)
        assert "tpu_custom_call" not in exported(functools.partial(f, backend=None), *args)  # this machine's device is a CPU


def test_program_contains_backward_kernel(rng):
    qkv, *others = draw(rng, [70]).arguments()

    def loss(qkv):
        return jnp.sum(gated_delta.chunked(qkv, *others, backend="tpu").out)

    with described_tpu():
        program = exported(jax.grad(loss), qkv)
    assert "gated_delta_chunked" in program
    assert "gated_delta_backward" in program


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"K": 16}, r"recurrent_state's widths K and V are \(16, 128\), and it takes \(128, 128\)"),
        ({"key_heads": 1}, "qkv has 1 key heads to 2 value heads, and it takes as many of each"),
        ({"heads": 65}, "recurrent_state has 65 heads, and it takes up to 64"),
        ({"dtype": jnp.float16}, "qkv is float16 and conv_state float16, and it takes float32 or bfloat16 for both"),
    ],
)
def test_unsupported_arguments_raise(options, message, rng, monkeypatch):
    monkeypatch.setattr(backends, "device_kind", lambda: "TPU v5 lite")
    case = truth.draw(rng, [3], **{"heads": 2, "K": 128, "V": 128, **options})
    with pytest.raises(NotImplementedError, match=f"backend 'tpu': {message}; backend 'reference' serves it"):
        gated_delta.chunked(*case.arguments(), backend="tpu")


def test_too_many_draft_tokens_raise(rng, monkeypatch):
    monkeypatch.setattr(backends, "device_kind", lambda: "TPU v5 lite")
    step = step_inputs(rng, 1, 9, 1, heads=1, K=128, V=128)
    with pytest.raises(NotImplementedError, match="qkv has 9 tokens a row, and it takes up to 8; backend 'reference'"):
        recurrent(*step, jnp.ones(1, jnp.int32), backend="tpu")


def test_tpu_backend_raises_on_other_device(rng):
    with pytest.raises(ValueError, match="backend 'tpu' is for TPU v5, TPU v6, TPU7, and the device is 'cpu'"):
        gated_delta.chunked(*draw(rng, [3]).arguments(), backend="tpu")
