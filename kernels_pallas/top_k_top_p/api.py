"""The threshold of top-k and top-p sampling, with a choice of backends.

Glossary: B rows, V scores of each.
"""

from jaxtyping import Array, Float32, Int32

from kernels_pallas.backends import HOPPER, REFERENCE, Implementation, dispatch
from kernels_pallas.top_k_top_p import gpu, reference


def sampling_threshold(
    scores: Float32[Array, "B V"],
    best: Float32[Array, " B"],
    top_k: Int32[Array, " B"],
    top_p: Float32[Array, " B"],
    *,
    backend: str | None = None,
) -> Float32[Array, " B"]:
    """Returns each row's lowest score that passes top-k and then top-p; tokens that tie with it pass too.

    Args:
      scores: logits after temperature, at least one per row finite; -inf for forbidden tokens.
      best: each row's largest score.
      top_k: the number of tokens that pass; 0, or V and more, for all.
      top_p: the fewest of those tokens pass whose probabilities, renormalised, sum to top_p; 1 for all.
      backend: "reference", "hopper", or None for the fastest that serves these arguments here.

    Raises:
      ValueError, NotImplementedError: the backend does not serve these arguments; the message names one that
        does.
    """
    implementations = {
        REFERENCE: Implementation(reference.sampling_threshold),
        HOPPER: Implementation(gpu.sampling_threshold, gpu.unsupported_reason(scores)),
    }
    return dispatch(backend, implementations)(scores, best, top_k, top_p)
