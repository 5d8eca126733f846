"""Gathers between tokens and chunks, for the backward passes of both chips.

A token is in at most one chunk, so both directions are gathers.
Glossary: T tokens, L tokens of a chunk.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from kernels_pallas.gated_delta.packing import CHUNK, Chunks


def chunk_rows(table: Chunks, tokens: int) -> Int32[Array, "chunks L"]:
    """Returns the token index of every row of each chunk; `tokens` where a row has no token."""
    within = jnp.arange(CHUNK, dtype=jnp.int32)[None]
    return jnp.where(within < table.num_tokens[:, None], table.start[:, None] + within, tokens)


def to_chunks(x: Float[Array, "T ..."], rows: Int32[Array, "chunks L"]) -> Float[Array, "chunks L ..."]:
    """Gathers the tokens of each chunk. Rows without a token become zeros."""
    return x.at[rows].get(mode="fill", fill_value=0)


def to_tokens(x: Shaped[Array, "chunks L ..."], rows: Int32[Array, "chunks L"], tokens: int) -> Shaped[Array, "T ..."]:
    """Gathers tokens from chunks, the inverse of `to_chunks`. Tokens of no chunk become zeros."""
    places = x.shape[0] * CHUNK
    place = jnp.full(tokens, places, jnp.int32).at[rows.reshape(-1)].set(jnp.arange(places, dtype=jnp.int32), mode="drop")
    return x.reshape(places, *x.shape[2:]).at[place].get(mode="fill", fill_value=0)
