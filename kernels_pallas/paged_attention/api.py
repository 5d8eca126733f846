"""Paged attention, with a choice of backends.

Keys and values lie in pages of 64 tokens, in any order; a block table lists each sequence's pages in the
order of its tokens. The queries of several sequences are in one row: one query each in decode, a chunk of the
prompt each in prefill.
The heads of a page lie side by side in one axis, because a TPU tiles the last two axes. With an axis of heads
before the last, each token would be a tile of its own, mostly empty on chip. So a page is whole tiles and a
head a slice of lanes.
Glossary: T queries, S sequences, N query heads, K key-value heads, H head width, KH = K x H, P pages, M pages
of the longest sequence.
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
    """Attends each query to its sequence's tokens up to its own; softmax in float32, scaled by H^-1/2.

    Args:
      q: sequence s has the queries `query_starts[s] : query_starts[s] + query_lens[s]`, which are its last
        tokens.
      keys, values: all pages, a token's K heads side by side. The queries' own tokens are already written.
      block_tables: each sequence's pages. Entries past a sequence's context have no effect on results.
      query_starts, query_lens: may leave gaps and may be empty; must not overlap.
      context_lens: tokens of each sequence, including its queries.
      max_query_len: static bound of `query_lens`; 1 in decode.
      backend: "reference", "hopper", "tpu", or None for the fastest that serves these arguments here.

    Returns:
      The attention's result, in q's dtype; zeros for queries of no sequence.

    Raises:
      ValueError, NotImplementedError: the backend does not serve these arguments; the message names one that
        does.
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
