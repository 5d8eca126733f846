"""The TPU kernels, interpreted on the CPU, against dense attention of each view alone in float64.

Interpretation fills unwritten memory with NaN and raises on racing accesses. Copies happen either when they
start or when they are waited for, by the case's mode. Rows of no view are NaN. Inputs are random in each run;
a failure prints the seed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import backends
from kernels_pallas.packed_attention import packed_attention, window_attention
from tests.kernels_pallas.test_gated_delta_tpu import HOW, described_tpu, exported
from tests.kernels_pallas.test_packed_attention import alone
from tests.tolerances import PACKED_ATTENTION, relative_rms
from tests.variants import in_full

HEADS, WIDTH = 2, 72


def attention(q, k, v, starts, lengths, backend="tpu", longest=2048):
    return packed_attention(q, k, v, starts, lengths, longest=longest, backend=backend)


def draw(rng, lengths, row, dtype):
    """Draws views with gaps between them and NaN in the gaps; two views are absent."""
    gaps = rng.integers(0, 3, len(lengths)) * rng.integers(0, 8, len(lengths))
    starts = np.cumsum(gaps + np.array([0, *lengths[:-1]]))
    assert starts[-1] + lengths[-1] <= row
    floats = rng.standard_normal((3, row, HEADS, WIDTH))
    real = np.zeros(row, bool)
    for start, length in zip(starts, lengths, strict=True):
        real[start : start + length] = True
    floats[:, ~real] = np.nan
    ints = np.append(starts, [row, row]), np.append(lengths, [0, 0])
    return *(jnp.asarray(x, dtype) for x in floats), *(jnp.asarray(x, jnp.int32) for x in ints)


def views(starts, lengths):
    return [slice(int(s), int(s + n)) for s, n in zip(starts, lengths, strict=True) if n]


def check_against_dense(out, q, k, v, starts, lengths):
    """Compares each view's rows with dense attention; other rows must be zeros."""
    unowned = np.ones(len(q), bool)
    assert out.dtype == q.dtype
    for view in views(starts, lengths):
        unowned[view] = False
        expected = alone(*(np.asarray(x[view], np.float64) for x in (q, k, v)))
        assert relative_rms(out[view], expected) < PACKED_ATTENTION[f"tpu {q.dtype}"]
    assert not np.asarray(out)[unowned].any()


@pytest.mark.parametrize(("dtype", "mode"), HOW)
def test_each_view_attends_within_itself(dtype, mode, rng, tpu):
    lengths = [1, *rng.integers(1, 40, 5), int(rng.integers(250, 450)), *rng.integers(1, 150, 2)]
    given = draw(rng, [int(n) for n in rng.permutation(lengths)], 1203, dtype)
    longest = int(rng.choice([450, 2048]))  # windows of 480 rows, or of 1,040
    check_against_dense(tpu(functools.partial(attention, longest=longest), *given, mode=mode), *given)


@pytest.mark.parametrize("row", [3, 300])
def test_short_rows(row, rng, tpu):
    given = draw(rng, [1, row // 2], row + 50, jnp.float32)
    check_against_dense(tpu(attention, *given), *given)


def test_no_view_at_all(rng, tpu):
    given = draw(rng, [0], 40, jnp.float32)
    check_against_dense(tpu(attention, *given), *given)


@pytest.mark.parametrize(("dtype", "mode"), HOW)
def test_gradients_agree_with_the_reference(dtype, mode, rng, tpu):
    """The reference is differentiated in float32."""
    lengths = [int(n) for n in rng.permutation([1, 4, int(rng.integers(5, 60)), int(rng.integers(120, 300))])]
    *floats, starts, lengths = draw(rng, lengths, 450, dtype)
    real = np.zeros(450, bool)
    for view in views(starts, lengths):
        real[view] = True
    bar = jnp.asarray(np.where(real[:, None, None], rng.standard_normal(floats[0].shape), np.nan), dtype)

    def gradients(q, k, v, bar, backend="tpu"):
        return jax.vjp(lambda *x: attention(*x, starts, lengths, backend), q, k, v)[1](bar)

    found = tpu(gradients, *floats, bar, mode=mode)
    exact = [jnp.where(real[:, None, None], x.astype(jnp.float32), 0.0) for x in (*floats, bar)]
    expected = jax.jit(functools.partial(gradients, backend="reference"))(*exact)
    for gradient, value in zip(found, expected, strict=True):
        assert gradient.dtype == dtype
        assert not np.asarray(gradient)[~real].any()
        assert relative_rms(gradient, value) < PACKED_ATTENTION[f"tpu {jnp.dtype(dtype)} gradient"]


@pytest.mark.parametrize("window", [4, *in_full(3)])
def test_windows(window, rng, tpu):
    """Windows and their gradients; windows of three rows begin off the tiles."""
    q, k, v, bar = (jnp.asarray(x, jnp.float32) for x in rng.standard_normal((4, 300, HEADS, WIDTH)))

    def outcome(*arguments, backend="tpu"):
        out, pull = jax.vjp(functools.partial(window_attention, window=window, backend=backend), *arguments[:3])
        return out, *pull(arguments[3])

    found = tpu(outcome, q, k, v, bar)
    expected = jax.jit(functools.partial(outcome, backend="reference"))(q, k, v, bar)
    for ours, value in zip(found, expected, strict=True):
        assert relative_rms(ours, value) < PACKED_ATTENTION["tpu float32 gradient"]


def test_kernels_are_in_the_program(rng):
    given = draw(rng, [70, 3], 200, jnp.bfloat16)

    def loss(q, k, v, *where):
        return attention(q, k, v, *where).astype(jnp.float32).sum()

    with described_tpu():
        for backend in ("tpu", None):
            program = exported(functools.partial(attention, backend=backend), *given)
            assert program.count("@tpu_custom_call") == 1
            assert "packed_attention" in program
        assert "tpu_custom_call" not in exported(functools.partial(attention, backend="reference"), *given)
        windows = exported(functools.partial(window_attention, window=4), *given[:3])
        assert "packed_attention" in windows
        backward = exported(jax.grad(loss, argnums=(0, 1, 2)), *given)
        assert "packed_attention_queries" in backward
        assert "packed_attention_keys_values" in backward
    assert "tpu_custom_call" not in exported(functools.partial(attention, backend=None), *given)  # this machine's device is a CPU


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((4, 2, 129), jnp.float32, "q's heads are 129 wide, and it takes up to 128"),
        ((4, 17, 72), jnp.float32, "q's 17 heads of 72 are 1224 wide together, and it takes up to 1152"),
        ((4, 65, 8), jnp.float32, "q has 65 heads, and it takes up to 64"),
        ((4, 2, 72), jnp.float16, "q is float16, and it takes float32 or bfloat16"),
    ],
)
def test_unsupported_arguments_are_refused(shape, dtype, message, monkeypatch):
    monkeypatch.setattr(backends, "device_kind", lambda: "TPU v5 lite")
    x, one = jnp.zeros(shape, dtype), jnp.ones(1, jnp.int32)
    with pytest.raises(NotImplementedError, match=f"backend 'tpu': {message}; backend 'reference' serves it"):
        attention(x, x, x, one, one)


def test_tpu_backend_is_refused_on_other_devices(rng):
    with pytest.raises(ValueError, match="backend 'tpu' is for TPU v5, TPU v6, TPU7, and the device is 'cpu'"):
        attention(*draw(rng, [3], 19, jnp.float32))
