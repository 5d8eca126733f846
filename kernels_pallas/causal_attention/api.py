"""Causal attention over packed rows, with a choice of backends.

Glossary: R rows, T tokens of a row, N query heads, K key-value heads, H head width.
"""

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from kernels_pallas.backends import HOPPER, REFERENCE, Implementation, dispatch
from kernels_pallas.causal_attention import gpu, reference
from kernels_pallas.remat import SAVE_NAME


def causal_attention(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    segments: Int32[Array, "R T"],
    *,
    backend: str | None = None,
) -> Float[Array, "R T N H"]:
    """Attends each query to its own sequence's tokens up to its own; softmax in float32, scaled by H^-1/2.

    Differentiable in q, k and v. The results that the backward pass needs besides the arguments have the name
    `remat.SAVE_NAME`.

    Args:
      q, k, v: N is a multiple of K; query head n reads key-value head n // (N // K).
      segments: each token's sequence within its row; a sequence's tokens are contiguous.
      backend: "reference", "hopper", or None for the fastest that serves these arguments here.

    Returns:
      The attention's result, in q's dtype.

    Raises:
      ValueError, NotImplementedError: the backend does not serve these arguments; the message names one that
        does.
    """
    implementations = {
        REFERENCE: Implementation(reference.causal_attention),
        HOPPER: Implementation(gpu.causal_attention, gpu.unsupported_reason(q, k)),
    }
    return checkpoint_name(dispatch(backend, implementations)(q, k, v, segments), SAVE_NAME)
