"""Chunk tables of ragged sequences.

Sequences share one row of tokens, and each is cut into chunks from its own start.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

CHUNK = 64  # tokens of a tile of the WY form; cutting a prefix at a multiple of it changes no bit


class Chunks(NamedTuple):
    """One entry per chunk, sequence after sequence, padded with entries of no tokens.

    Attributes:
      sequence: the chunk's sequence; for padding, the number of sequences.
      start: index of its first token in the row of tokens.
      num_tokens: its tokens, 1 to CHUNK; 0 for padding.
      index: 0 for a sequence's first chunk, then 1, 2, ...
    """

    sequence: Int32[Array, " chunks"]
    start: Int32[Array, " chunks"]
    num_tokens: Int32[Array, " chunks"]
    index: Int32[Array, " chunks"]


def max_chunks(tokens: int, sequences: int) -> int:
    """Returns the largest number of chunks that `sequences` sequences within `tokens` tokens can have."""
    return (tokens + (CHUNK - 1) * sequences) // CHUNK


def chunk_table(query_starts: Int32[Array, " S"], query_lens: Int32[Array, " S"], tokens: int) -> Chunks:
    """Cuts every sequence into chunks. Empty sequences have none."""
    sequences = query_starts.shape[0]
    ends = jnp.cumsum((query_lens + CHUNK - 1) // CHUNK)
    chunk = jnp.arange(max_chunks(tokens, sequences), dtype=jnp.int32)
    sequence = jnp.searchsorted(ends, chunk, side="right", method="compare_all").astype(jnp.int32)
    first_chunk = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])[sequence]
    real = sequence < sequences
    own = jnp.minimum(sequence, sequences - 1)
    index = jnp.where(real, chunk - first_chunk, 0).astype(jnp.int32)
    start = jnp.where(real, query_starts[own] + CHUNK * index, 0)
    num_tokens = jnp.where(real, jnp.minimum(query_lens[own] - CHUNK * index, CHUNK), 0)
    return Chunks(sequence, start, num_tokens, index)


def snapshot_of_chunk(table: Chunks, snapshots: Int32[Array, "P 2"]) -> Int32[Array, " chunks"]:
    """Returns the index of the snapshot taken at each chunk's end, or -1.

    A chunk fills at most one snapshot: the last that names it.
    """
    matches = (table.sequence[:, None] == snapshots[None, :, 0]) & (table.index[:, None] + 1 == snapshots[None, :, 1])
    matches &= (table.num_tokens == CHUNK)[:, None]
    order = jnp.arange(snapshots.shape[0], dtype=jnp.int32)[None]
    return jnp.max(jnp.where(matches, order, -1), axis=1, initial=-1)
