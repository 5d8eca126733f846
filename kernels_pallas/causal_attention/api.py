"""The operation; `backend` says who runs it.

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
    """Each query over its own sequence's tokens up to its own, scaled by H^-1/2; softmax in float32. Differentiable in q, k, v.

    What the backward pass needs besides the arguments bears the name `remat.SAVE_NAME`.

    Args:
      q, k, v: N is a multiple of K; query head n reads key-value head n // (N // K).
      segments: which sequence of its row a token belongs to; a sequence's tokens stand together.
      backend: "reference", or "hopper"; None for the fastest that serves.

    Returns:
      In q's dtype.

    Raises:
      ValueError, NotImplementedError: the backend does not serve these arguments; the message names one that does.
    """
    implementations = {
        REFERENCE: Implementation(reference.causal_attention),
        HOPPER: Implementation(gpu.causal_attention, gpu.unsupported_reason(q, k)),
    }
    return checkpoint_name(dispatch(backend, implementations)(q, k, v, segments), SAVE_NAME)
