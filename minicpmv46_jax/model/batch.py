"""Which tokens a call of the backbone has, and where their sequences are kept.

Tokens of all sequences stand in one row, T of them. There are four kinds of calls:

- `FullBatch`: complete sequences, forgotten afterwards; the readable forward.
- `PackedBatch`: complete sequences, several in each of R rows; training.
- `PrefillBatch`: a piece of each of several prompts, of any length; where a piece ends the next call goes on.
- `DecodeBatch`: one token of each of many sequences; decoding.

Glossary: T tokens, S sequences of the call, M pages a sequence may have, N snapshots, R rows of L tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from kernels_pallas.paged_attention import PAGE
from minicpmv46_jax.trees import tree_dataclass


@tree_dataclass
class FullBatch:
    """S sequences of the same padded width; the first `query_lens` tokens of each are real."""

    query_lens: Int32[Array, " S"]

    def positions(self, tokens: int) -> Int32[Array, " T"]:
        """Each token's place in its sequence."""
        return jnp.tile(jnp.arange(tokens // self.query_lens.shape[0], dtype=jnp.int32), self.query_lens.shape[0])

    def real(self, tokens: int) -> Bool[Array, " T"]:
        """Which tokens are a sequence's."""
        return self.positions(tokens) < jnp.repeat(self.query_lens, tokens // self.query_lens.shape[0])


@tree_dataclass
class PackedBatch:
    """Complete sequences, several in each of R rows of L tokens; T = R x L, row after row.

    `segments` says which sequence of its row each token belongs to: 1, 2, ... in order, and 0 for the padding at a row's end.
    """

    segments: Int32[Array, "R L"]

    def positions(self, tokens: int) -> Int32[Array, " T"]:
        """Each token's place in its sequence."""
        del tokens  # as many as segments
        index = jnp.broadcast_to(jnp.arange(self.segments.shape[1], dtype=jnp.int32)[None], self.segments.shape)
        begins = jnp.diff(self.segments, axis=1, prepend=-1) != 0
        return (index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)).reshape(-1)

    def real(self, tokens: int) -> Bool[Array, " T"]:
        """Which tokens are a sequence's."""
        del tokens
        return self.segments.reshape(-1) > 0


@tree_dataclass
class PrefillBatch:
    """Pieces of prompts.

    Attributes:
      query_starts, query_lens: sequence s has the tokens `query_starts[s] : query_starts[s] + query_lens[s]`, one sequence after
        the other; an entry without tokens starts at T.
      num_computed: tokens of each sequence that came in earlier calls.
      slots: where each sequence's memory goes; -1 for an entry without tokens.
      source_slots: the slot of the memory it begins with: its own, a snapshot's, or -1 for none.
      block_tables: each sequence's pages.
      snapshots: (sequence, chunks): its memory after so many chunks of 64 tokens of this call is kept ...
      snapshot_slots: ... in this slot; -1 for nothing.
    """

    query_starts: Int32[Array, " S"]
    query_lens: Int32[Array, " S"]
    num_computed: Int32[Array, " S"]
    slots: Int32[Array, " S"]
    source_slots: Int32[Array, " S"]
    block_tables: Int32[Array, "S M"]
    snapshots: Int32[Array, "N 2"]
    snapshot_slots: Int32[Array, " N"]

    @property
    def context_lens(self) -> Int32[Array, " S"]:
        """Tokens of each sequence after this call."""
        return self.num_computed + self.query_lens

    def sequences(self, tokens: int) -> Int32[Array, " T"]:
        """Whose each token is; padding belongs to the sequence before it."""
        token = jnp.arange(tokens, dtype=jnp.int32)
        return jnp.searchsorted(self.query_starts, token, side="right", method="compare_all").astype(jnp.int32) - 1

    def positions(self, tokens: int) -> Int32[Array, " T"]:
        """Each token's place in its sequence."""
        own = self.sequences(tokens)
        return self.num_computed[own] + jnp.arange(tokens, dtype=jnp.int32) - self.query_starts[own]

    def pages(self, tokens: int) -> Int32[Array, " T"]:
        """The page that each token's key and value go to; -1 for padding."""
        own, positions = self.sequences(tokens), self.positions(tokens)
        return jnp.where(self.real(tokens), page_at(self.block_tables, own, positions), -1)

    def real(self, tokens: int) -> Bool[Array, " T"]:
        """Which tokens are a sequence's."""
        return self.positions(tokens) < self.context_lens[self.sequences(tokens)]

    def max_query_len(self, tokens: int) -> int:
        """No sequence has more tokens here."""
        return tokens


@tree_dataclass
class DecodeBatch:
    """One token of each sequence.

    Attributes:
      slots: each sequence's; -1 for a row that rests.
      num_computed: tokens of each sequence that came earlier.
      block_tables: each sequence's pages.
    """

    slots: Int32[Array, " S"]
    num_computed: Int32[Array, " S"]
    block_tables: Int32[Array, "S M"]

    @property
    def active(self) -> Bool[Array, " S"]:
        """Which rows do not rest."""
        return self.slots >= 0

    @property
    def query_starts(self) -> Int32[Array, " S"]:
        """Row s is token s."""
        return jnp.arange(self.slots.shape[0], dtype=jnp.int32)

    @property
    def query_lens(self) -> Int32[Array, " S"]:
        """One token, or none."""
        return self.active.astype(jnp.int32)

    @property
    def context_lens(self) -> Int32[Array, " S"]:
        """Tokens of each sequence after this call; 0 for a row that rests."""
        return jnp.where(self.active, self.num_computed + 1, 0)

    def positions(self, tokens: int) -> Int32[Array, " T"]:
        """Each token's place in its sequence."""
        del tokens  # as many as rows
        return self.num_computed

    def pages(self, tokens: int) -> Int32[Array, " T"]:
        """The page that each token's key and value go to; -1 for a row that rests."""
        del tokens
        return jnp.where(self.active, page_at(self.block_tables, self.query_starts, self.num_computed), -1)

    def max_query_len(self, tokens: int) -> int:
        """No sequence has more tokens here."""
        del tokens
        return 1


Batch = FullBatch | PackedBatch | PrefillBatch | DecodeBatch


def page_at(
    block_tables: Int32[Array, "S M"], sequences: Int32[Array, " T"], positions: Int32[Array, " T"]
) -> Int32[Array, " T"]:
    """The page of a position of a sequence."""
    return block_tables[sequences, jnp.clip(positions // PAGE, 0, block_tables.shape[1] - 1)]


def scatter_index(slots: Int32[Array, "..."], size: int) -> Int32[Array, "..."]:
    """Indices for a scatter with mode "drop": -1, which would be the last entry, becomes one past it."""
    return jnp.where(slots < 0, size, slots)
