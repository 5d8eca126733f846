"""The operation, one function; `backend` says who runs it.

Keys and values lie in pages of 64 tokens, in any order; a table names each sequence's pages in the order of its tokens. The
queries of several sequences stand in one row: one each in decoding, a piece of a prompt each while prompts are read.
Glossary: T queries, S sequences, N query heads, K key-value heads, H head width, P pages, M pages of the longest sequence.
"""

from jaxtyping import Array, Float, Int32

from kernels_pallas.backends import REFERENCE, choose
from kernels_pallas.paged_attention import reference

PAGE = 64  # tokens; a chunk of the gated delta rule, so that a prefix is whole pages and whole chunks


def paged_attention(
    q: Float[Array, "T N H"],
    keys: Float[Array, "P page K H"],
    values: Float[Array, "P page K H"],
    tables: Int32[Array, "S M"],
    starts: Int32[Array, " S"],
    lengths: Int32[Array, " S"],
    contexts: Int32[Array, " S"],
    *,
    longest: int,
    backend: str | None = None,
) -> Float[Array, "T N H"]:
    """Each query over its sequence's tokens up to and with its own; softmax in float32, scaled by H^-1/2.

    Args:
      q: sequence s has the queries `starts[s] : starts[s] + lengths[s]`; they are its last tokens.
      keys, values: all pages; those of the queries' own tokens are written already.
      tables: each sequence's pages; what lies past a sequence's context is never read into a result.
      starts, lengths: may leave gaps and may be empty, must not overlap.
      contexts: tokens of each sequence, its queries counted in.
      longest: static bound of `lengths`; 1 in decoding.
      backend: "reference", or None for the fastest that serves these arguments here.

    Returns:
      In q's dtype; zeros for queries of no sequence.

    Raises:
      ValueError, NotImplementedError: the backend does not serve these arguments; the message names one that does.
    """
    if keys.shape[1] != PAGE or q.shape[1] % keys.shape[2]:
        raise ValueError(f"keys are {keys.shape}, expected pages of {PAGE} and heads that divide q's {q.shape[1]}")
    implementations = {REFERENCE: reference.paged_attention}
    run = implementations[choose(backend, dict.fromkeys(implementations))]
    return run(q, keys, values, tables, starts, lengths, contexts, longest)
