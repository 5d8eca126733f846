"""Batches of the text backbone: the tokens of one call, and the slots and pages of their sequences.

The tokens of all sequences are concatenated into one axis of T tokens. There are four kinds of batches:

- `FullBatch`: complete sequences, no state kept; the readable forward.
- `PackedBatch`: complete sequences, several in each of R rows, no state kept; training.
- `PrefillBatch`: a chunk of any length of each of several prompts; the next call continues at its end.
- `DecodeBatch`: one token of each of several sequences.

Glossary: T tokens, S sequences of the call, M pages a sequence may have, N snapshots, R rows of L tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from kernels_pallas.paged_attention import PAGE
from minicpmv46_jax.trees import tree_dataclass


@tree_dataclass
class FullBatch:
    """S sequences padded to the same length; the first `query_lens` tokens of each are valid."""

    query_lens: Int32[Array, " S"]

    def rope_positions(self, tokens: int) -> Int32[Array, " T"]:
        """Returns each token's position for the rotary embedding: its index in its sequence."""
        return jnp.tile(jnp.arange(tokens // self.query_lens.shape[0], dtype=jnp.int32), self.query_lens.shape[0])

    def valid(self, tokens: int) -> Bool[Array, " T"]:
        """Returns True for tokens of a sequence and False for padding."""
        return self.rope_positions(tokens) < jnp.repeat(self.query_lens, tokens // self.query_lens.shape[0])


@tree_dataclass
class PackedBatch:
    """Complete sequences, several in each of R rows of L tokens; T = R x L, row after row.

    `segments` numbers the sequences of a row 1, 2, ... in order; padding at a row's end is 0.
    """

    segments: Int32[Array, "R L"]

    def rope_positions(self, tokens: int) -> Int32[Array, " T"]:
        """Returns each token's position for the rotary embedding: its index in its sequence."""
        del tokens  # equals the size of segments
        index = jnp.broadcast_to(jnp.arange(self.segments.shape[1], dtype=jnp.int32)[None], self.segments.shape)
        is_first = jnp.diff(self.segments, axis=1, prepend=-1) != 0
        return (index - jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)).reshape(-1)

    def valid(self, tokens: int) -> Bool[Array, " T"]:
        """Returns True for tokens of a sequence and False for padding."""
        del tokens
        return self.segments.reshape(-1) > 0


@tree_dataclass
class PrefillBatch:
    """Chunks of prompts.

    Attributes:
      query_starts, query_lens: sequence s has the tokens `query_starts[s] : query_starts[s] + query_lens[s]`.
        Sequences follow one another; an unused entry starts at T.
      num_computed: tokens of each sequence that earlier calls computed.
      slots: the slot that receives each sequence's recurrent and conv state; -1 for an unused entry.
      source_slots: the slot of the state that the chunk starts from: its own, a snapshot's, or -1 for zeros.
      block_tables: each sequence's pages.
      snapshots: (sequence, chunks): the state after that many kernel chunks of 64 tokens is copied ...
      snapshot_slots: ... to this slot; -1 for an unused entry.
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

    def token_sequences(self, tokens: int) -> Int32[Array, " T"]:
        """Returns each token's sequence; padding counts to the sequence before it."""
        token = jnp.arange(tokens, dtype=jnp.int32)
        return jnp.searchsorted(self.query_starts, token, side="right", method="compare_all").astype(jnp.int32) - 1

    def rope_positions(self, tokens: int) -> Int32[Array, " T"]:
        """Returns each token's position for the rotary embedding; images too have plain positions."""
        return self.cache_positions(tokens)

    def cache_positions(self, tokens: int) -> Int32[Array, " T"]:
        """Returns each token's index in its sequence, which decides its page and its place there."""
        own = self.token_sequences(tokens)
        return self.num_computed[own] + jnp.arange(tokens, dtype=jnp.int32) - self.query_starts[own]

    def token_pages(self, tokens: int) -> Int32[Array, " T"]:
        """Returns the page that stores each token's key and value; -1 for padding."""
        own, positions = self.token_sequences(tokens), self.cache_positions(tokens)
        return jnp.where(self.valid(tokens), page_of_position(self.block_tables, own, positions), -1)

    def valid(self, tokens: int) -> Bool[Array, " T"]:
        """Returns True for tokens of a sequence and False for padding."""
        return self.cache_positions(tokens) < self.context_lens[self.token_sequences(tokens)]

    def max_query_len(self, tokens: int) -> int:
        """Returns a static upper bound of `query_lens`."""
        return tokens


@tree_dataclass
class DecodeBatch:
    """One token of each sequence.

    Attributes:
      slots: each sequence's slot; -1 for an inactive row.
      num_computed: tokens of each sequence that earlier calls computed.
      block_tables: each sequence's pages.
    """

    slots: Int32[Array, " S"]
    num_computed: Int32[Array, " S"]
    block_tables: Int32[Array, "S M"]

    @property
    def active(self) -> Bool[Array, " S"]:
        """True for rows that have a slot."""
        return self.slots >= 0

    @property
    def query_starts(self) -> Int32[Array, " S"]:
        """Index of each row's token: row s is token s."""
        return jnp.arange(self.slots.shape[0], dtype=jnp.int32)

    @property
    def query_lens(self) -> Int32[Array, " S"]:
        """1 for an active row, else 0."""
        return self.active.astype(jnp.int32)

    @property
    def context_lens(self) -> Int32[Array, " S"]:
        """Tokens of each sequence after this call; 0 for an inactive row."""
        return jnp.where(self.active, self.num_computed + 1, 0)

    def rope_positions(self, tokens: int) -> Int32[Array, " T"]:
        """Returns each token's position for the rotary embedding; images too have plain positions."""
        return self.cache_positions(tokens)

    def cache_positions(self, tokens: int) -> Int32[Array, " T"]:
        """Returns each token's index in its sequence, which decides its page and its place there."""
        del tokens  # equals the number of rows
        return self.num_computed

    def token_pages(self, tokens: int) -> Int32[Array, " T"]:
        """Returns the page that stores each token's key and value; -1 for an inactive row."""
        return jnp.where(self.active, page_of_position(self.block_tables, self.query_starts, self.cache_positions(tokens)), -1)

    def max_query_len(self, tokens: int) -> int:
        """Returns a static upper bound of `query_lens`."""
        del tokens
        return 1


Batch = FullBatch | PackedBatch | PrefillBatch | DecodeBatch


def page_of_position(
    block_tables: Int32[Array, "S M"], sequences: Int32[Array, " T"], positions: Int32[Array, " T"]
) -> Int32[Array, " T"]:
    """Returns the page of the token at a cache position of a sequence."""
    return block_tables[sequences, jnp.clip(positions // PAGE, 0, block_tables.shape[1] - 1)]


def scatter_index(slots: Int32[Array, "..."], size: int) -> Int32[Array, "..."]:
    """Returns indices for a scatter with mode "drop": -1, which would be the last entry, becomes `size`."""
    return jnp.where(slots < 0, size, slots)
