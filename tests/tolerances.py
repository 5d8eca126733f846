"""All tolerances of the tests, each with its reason. They are relative RMS errors: |a - b| / |b|."""

import numpy as np

FLOAT32_FORWARD = 1e-4  # the project's bar for every tap and the logits; seen: 3e-7 to 3e-6
FLOAT32_ONE_OP = 2e-6  # one operation against float64: sums of up to some thousand float32 products
CACHED_FORWARD = 2e-5  # decode against the cache-free forward: the same float32 sums in another order; seen: 5e-6
BFLOAT16_RATIO = 1.2  # our bfloat16 error over transformers' bfloat16 error, both against float32

# The gated delta rule against the naive recurrence in float64, for all lengths and decays. The chunked form
# subtracts cumulated logarithms of the decay. The exponential turns their rounding into a relative error: up
# to 1e-5 in float32 at decays of 1e-6 a token. The TPU kernels were seen at 4e-6 (float32, decays of 1e-6;
# else 4e-7) and 4.2e-3 (bfloat16 operands of the matrix unit). Gradients are compared with the reference's
# own: seen 1e-6, but 1e-4 for a_log at decays of 1e-6, because it is a small sum of large terms. In bfloat16
# they are seen up to 6e-3; the reference itself in bfloat16 against float32 has 1e-2.
GATED_DELTA = {
    "reference": 3e-5,
    "gpu bfloat16": 8e-3,  # outputs, and the recurrent state after chunks; seen on an H200: up to 5.1e-3
    "gpu bfloat16 gradient": 2.5e-2,  # seen in the interpreter: up to 5e-3, gates' at decays of 1 - 1e-6 up to 1.7e-2
    "gpu memory": 1e-6,  # after single steps, which multiply in float32; seen: 1.5e-7
    "tpu float32": 3e-5,
    "tpu bfloat16": 8e-3,
    "tpu float32 gradient": 5e-4,
    "tpu bfloat16 gradient": 2e-2,
}

# Paged attention against dense attention in float64 of the same rounded inputs. In bfloat16 the softmax's
# weights and the result are rounded to 8 bits.
PAGED_ATTENTION = {"tpu float32": 2e-6, "tpu bfloat16": 6e-3, "gpu bfloat16": 6e-3}  # on an H200: up to 2.3e-3
# Packed attention likewise; its gradients against the reference's own, in float32.
PACKED_ATTENTION = {
    "gpu bfloat16": 6e-3,
    "gpu bfloat16 gradient": 1e-2,
    "tpu float32": 2e-6,
    "tpu bfloat16": 6e-3,
    "tpu float32 gradient": 5e-6,
    "tpu bfloat16 gradient": 1e-2,
}


def rms(x) -> float:
    """Returns the root mean square, in float64."""
    return float(np.sqrt(np.mean(np.asarray(x, np.float64) ** 2)))


def relative_rms(found, expected, least: float = 0.0) -> float:
    """Returns the RMS of the difference over that of `expected`, in float64.

    The denominator is at least `least`.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"shapes {found.shape} and {expected.shape}"
    assert np.isfinite(found).all()
    return rms(found - expected) / max(rms(expected), least)
