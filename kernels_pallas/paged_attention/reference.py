"""Paged attention in readable jnp: blocks of queries visit their sequence's pages, several at a time.

The loop over pages ends with the longest context present, and the softmax is online (arXiv:2205.14135). A
block's result depends neither on the other sequences nor on the width of the block tables: pages past its own
context add exact zeros.
Glossary: C blocks of queries, L queries of a block, G query heads of a key-value head, W tokens visited at
once; the others as in the api.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float, Float32, Int32

QUERY_BLOCK = 64  # queries; a prompt's last block wastes fewer rows than this
PAGES_AT_ONCE = 8  # 512 tokens: one visit for most chats, and scores of 64 x 512 per head


class QueryBlocks(NamedTuple):
    """Blocks of consecutive queries of one sequence each.

    Attributes:
      sequence: each block's sequence.
      rows: the queries' rows in `q`.
      positions: the queries' positions in their sequence.
      real: False for rows past the sequence's last query.
    """

    sequence: Int32[Array, " C"]
    rows: Int32[Array, "C L"]
    positions: Int32[Array, "C L"]
    real: Bool[Array, "C L"]


class OnlineSoftmax(NamedTuple):
    """The softmax so far: weighted sum of the values, sum of the weights, largest score."""

    total: Float32[Array, "C L K G H"]
    weight: Float32[Array, "C L K G"]
    largest: Float32[Array, "C L K G"]


def paged_attention(
    q: Float[Array, "T N H"],
    keys: Float[Array, "P page KH"],
    values: Float[Array, "P page KH"],
    block_tables: Int32[Array, "S M"],
    query_starts: Int32[Array, " S"],
    query_lens: Int32[Array, " S"],
    context_lens: Int32[Array, " S"],
    max_query_len: int,
) -> Float[Array, "T N H"]:
    """Computes `api.paged_attention`."""
    (T, N, H), page = q.shape, keys.shape[1]
    K = keys.shape[2] // H
    blocks = query_blocks(query_starts, query_lens, context_lens, T, min(max_query_len, QUERY_BLOCK))
    C, L = blocks.rows.shape
    q_CLKGH = q[jnp.clip(blocks.rows, 0, T - 1)].reshape(C, L, K, N // K, H)
    block_tables = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % PAGES_AT_ONCE)))[blocks.sequence]
    visits = -(-jnp.max(context_lens, initial=0) // (PAGES_AT_ONCE * page))

    def visit(i: Array, running: OnlineSoftmax) -> OnlineSoftmax:
        table = jax.lax.dynamic_slice_in_dim(block_tables, i * PAGES_AT_ONCE, PAGES_AT_ONCE, axis=1)
        k, v = (x[jnp.clip(table, 0, None)].reshape(C, -1, K, H) for x in (keys, values))
        position_W = i * PAGES_AT_ONCE * page + jnp.arange(k.shape[1], dtype=jnp.int32)
        visible_CLW = (position_W[None, None] <= blocks.positions[..., None]) & blocks.real[..., None]
        return _add(running, q_CLKGH, k, v, visible_CLW)

    zeros = jnp.zeros((C, L, K, N // K), jnp.float32)
    running = OnlineSoftmax(jnp.zeros(q_CLKGH.shape, jnp.float32), zeros, jnp.full_like(zeros, -jnp.inf))
    running = jax.lax.fori_loop(0, visits, visit, running)
    out = running.total / jnp.where(running.weight > 0, running.weight, 1.0)[..., None]
    rows = jnp.where(blocks.real, blocks.rows, T)
    return jnp.zeros_like(q).at[rows].set(out.reshape(C, L, N, H).astype(q.dtype), mode="drop")


def query_blocks(
    query_starts: Int32[Array, " S"], query_lens: Int32[Array, " S"], context_lens: Int32[Array, " S"], tokens: int, size: int
) -> QueryBlocks:
    """Cuts every sequence's queries into blocks of `size`; the number of blocks is a static bound."""
    sequences = query_starts.shape[0]
    ends = jnp.cumsum((query_lens + size - 1) // size)
    block = jnp.arange((tokens + (size - 1) * sequences) // size, dtype=jnp.int32)
    sequence = jnp.searchsorted(ends, block, side="right", method="compare_all").astype(jnp.int32)
    first_blocks = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])[sequence]
    owner = jnp.minimum(sequence, sequences - 1)
    within = (size * (block - first_blocks))[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    real = (sequence < sequences)[:, None] & (within < query_lens[owner][:, None])
    rows = query_starts[owner][:, None] + within
    return QueryBlocks(owner, rows, (context_lens - query_lens)[owner][:, None] + within, real)


def token_rows(
    query_starts: Int32[Array, " S"], query_lens: Int32[Array, " S"], tokens: int, size: int
) -> tuple[Int32[Array, " T"], Bool[Array, " T"]]:
    """Returns the inverse of `query_blocks`.

    Returns:
      Each token's row among the blocks' rows, and whether the token belongs to a sequence.
    """
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    inside_TS = (token >= query_starts[None]) & (token < (query_starts + query_lens)[None])
    sequence = jnp.argmax(inside_TS, axis=1)
    num_blocks = -(-query_lens // size)
    first_block = jnp.cumsum(num_blocks) - num_blocks
    row = first_block[sequence] * size + token[:, 0] - query_starts[sequence]
    return row, inside_TS.any(axis=1)


def _add(
    running: OnlineSoftmax,
    q: Float[Array, "C L K G H"],
    k: Float[Array, "C W K H"],
    v: Float[Array, "C W K H"],
    visible: Bool[Array, "C L W"],
) -> OnlineSoftmax:
    """Adds W tokens to the softmax."""
    precision = Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("clkgh,cwkh->clkgw", q, k, precision=precision, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, :, None, None], scores, -jnp.inf)
    largest = jnp.maximum(running.largest, scores.max(axis=-1))
    finite_max = jnp.where(jnp.isfinite(largest), largest, 0.0)  # before the first visible token exp(-inf - 0) must be 0
    decay = jnp.exp(running.largest - finite_max)
    weights = jnp.exp(scores - finite_max[..., None])
    mixed = jnp.einsum("clkgw,cwkh->clkgh", weights.astype(q.dtype), v, precision=precision, preferred_element_type=jnp.float32)
    return OnlineSoftmax(running.total * decay[..., None] + mixed, running.weight * decay + weights.sum(axis=-1), largest)
