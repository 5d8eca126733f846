"""The operation, one function; `backend` says who runs it.

Keys and values lie in pages of 64 tokens, in any order; a table names each sequence's pages in the order of its tokens. The
queries of several sequences stand in one row: one each in decoding, a piece of a prompt each while prompts are read.
The heads of a page stand side by side in one axis, because a TPU tiles the last two axes: with the heads in the last but one each
token would be a tile of its own, mostly empty on chip; so a page is whole tiles and a head a slice of lanes.
Glossary: T queries, S sequences, N query heads, K key-value heads, H head width, KH = K x H, P pages, M pages of the longest
sequence.
"""

from jaxtyping import Array, Float, Int32

from kernels_pallas.backends import HOPPER, REFERENCE, TPU, Implementation, dispatch
from kernels_pallas.page_size import PAGE
from kernels_pallas.paged_attention import gpu, reference, tpu


def paged_attention(
    q: Float[Array, "T N H"],
    keys: Float[Array, "P page KH"],
    values: Float[Array, "P page KH"],
    block_tables: Int32[Array, "S M"],
    query_starts: Int32[Array, " S"],
    query_lens: Int32[Array, " S"],
    context_lens: Int32[Array, " S"],
    *,
    max_query_len: int,
    backend: str | None = None,
) -> Float[Array, "T N H"]:
    """Each query over its sequence's tokens up to and with its own; softmax in float32, scaled by H^-1/2.

    Args:
      q: sequence s has the queries `query_starts[s] : query_starts[s] + query_lens[s]`; they are its last tokens.
      keys, values: all pages, a token's K heads side by side; those of the queries' own tokens are written already.
      block_tables: each sequence's pages; what lies past a sequence's context is never read into a result.
      query_starts, query_lens: may leave gaps and may be empty, must not overlap.
      context_lens: tokens of each sequence, its queries counted in.
      max_query_len: static bound of `query_lens`; 1 in decoding.
      backend: "reference", "hopper", "tpu", or None for the fastest that serves these arguments here.

    Returns:
      In q's dtype; zeros for queries of no sequence.

    Raises:
      ValueError, NotImplementedError: the backend does not serve these arguments; the message names one that does.
    """
    _, N, H = q.shape
    if keys.shape[1] != PAGE or keys.shape[2] % H or N % (keys.shape[2] // H):
        raise ValueError(f"keys are {keys.shape}, expected pages of {PAGE} and heads of q's width {H} that divide its {N}")
    if (values.shape, values.dtype) != (keys.shape, keys.dtype):
        raise ValueError(f"values are {values.dtype} {values.shape} and keys {keys.dtype} {keys.shape}, expected them alike")
    implementations = {
        REFERENCE: Implementation(reference.paged_attention),
        HOPPER: Implementation(gpu.paged_attention, gpu.unsupported_reason(q, keys)),
        TPU: Implementation(tpu.paged_attention, tpu.unsupported_reason(q, keys)),
    }
    run = dispatch(backend, implementations)
    return run(q, keys, values, block_tables, query_starts, query_lens, context_lens, max_query_len)
