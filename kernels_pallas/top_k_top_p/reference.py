"""Top-k and top-p thresholds in plain XLA: repeated passes over each row instead of a sort."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from kernels_pallas.backends import device_kind


def sampling_threshold(
    scores: Float32[Array, "B V"], best: Float32[Array, " B"], top_k: Int32[Array, " B"], top_p: Float32[Array, " B"]
) -> Float32[Array, " B"]:
    """Computes `api.sampling_threshold`."""
    V, cpu = scores.shape[-1], device_kind() == "cpu"
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    kth = _least_score(scores, lambda found: jnp.ones_like(scores, jnp.int32), k, jnp.full_like(best, -jnp.inf))
    whole = jnp.exp(scores - best[:, None])

    def weights(found: UInt32[Array, " B"]) -> Float32[Array, "B V"]:
        """Returns the same weights in every pass.

        A chip recomputes them, because a read of stored weights takes as long as a read of the scores.
        """
        never = found == jnp.uint32(2**32 - 1)  # always False, but XLA must not hoist the weights out of the loop
        return whole if cpu else jnp.exp(scores - jnp.where(never, 0.0, best)[:, None])

    total = jnp.where(scores >= kth[:, None], whole, 0.0).sum(axis=-1)
    last = _least_score(scores, weights, top_p * total, kth)
    return jnp.where(top_p < 1.0, last, kth)


def _least_score(
    scores: Float32[Array, "B V"],
    weights: Callable[[UInt32[Array, " B"]], Int32[Array, "B V"] | Float32[Array, "B V"]],
    least: Int32[Array, " B"] | Float32[Array, " B"],
    floor: Float32[Array, " B"],
) -> Float32[Array, " B"]:
    """Finds in each row the highest score from which on the weights sum to `least`; at least `floor`.

    A pass over the row finds one bit on a CPU. A chip finds two, because it adds three sums in a pass for the
    price of one.
    """
    bits = 1 if device_kind() == "cpu" else 2

    def narrow(i: Int32[Array, ""], found: UInt32[Array, " B"]) -> UInt32[Array, " B"]:
        shift = (32 - bits * (i + 1)).astype(jnp.uint32)
        marks = found[:, None] | (jnp.arange(1, 2**bits, dtype=jnp.uint32) << shift)[None]
        levels, weight = jnp.maximum(score_at(marks), floor[:, None]), weights(found)
        above = [jnp.where(scores >= levels[:, i, None], weight, 0) for i in range(2**bits - 1)]
        zeros = [jnp.zeros((), weight.dtype)] * len(above)
        sums = jax.lax.reduce(above, zeros, lambda x, y: [a + b for a, b in zip(x, y, strict=True)], (1,))  # all in one pass
        reached = jnp.stack(sums, axis=1) >= least[:, None]
        return found | (reached.sum(axis=1).astype(jnp.uint32) << shift)

    nothing = (least < 0).astype(jnp.uint32)  # 0, but not a constant: XLA would keep the first search's masks
    found = jax.lax.fori_loop(0, 32 // bits, narrow, nothing, unroll=bits > 1)  # a loop compiles faster
    return jnp.maximum(score_at(found), floor)


def score_at(places: UInt32[Array, "..."]) -> Float32[Array, "..."]:
    """Returns the scores at these places in the order of all float32; -inf for places below -inf.

    Denormal numbers become 0: a CPU treats them as 0 in comparisons, and a GPU does not.
    """
    sign, lowest, normal = jnp.uint32(1 << 31), jnp.uint32(0x007FFFFF), jnp.uint32(0x00800000)
    places = jnp.maximum(places, lowest)
    bits = jnp.where(places >= sign, places ^ sign, ~places)
    return jnp.where((bits & ~sign) < normal, 0.0, jax.lax.bitcast_convert_type(bits, jnp.float32))
