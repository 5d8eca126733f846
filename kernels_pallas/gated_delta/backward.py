"""What the backward passes of both chips do outside of kernels: tokens to chunks and back, the convolution of a packed row.

A token is in one chunk at most, so both ways are gathers.
Glossary: S sequences, T tokens, L tokens of a chunk, C channels, W conv width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from kernels_pallas.gated_delta.packing import CHUNK, Chunks


def chunk_rows(table: Chunks, tokens: int) -> Int32[Array, "chunks L"]:
    """Each chunk's tokens; `tokens` where it has none."""
    within = jnp.arange(CHUNK, dtype=jnp.int32)[None]
    return jnp.where(within < table.rows[:, None], table.row[:, None] + within, tokens)


def to_chunks(x: Float[Array, "T ..."], rows: Int32[Array, "chunks L"]) -> Float[Array, "chunks L ..."]:
    """The tokens of each chunk, zeros where it has none."""
    return x.at[rows].get(mode="fill", fill_value=0)


def to_tokens(x: Shaped[Array, "chunks L ..."], rows: Int32[Array, "chunks L"], tokens: int) -> Shaped[Array, "T ..."]:
    """The inverse of `to_chunks`; zeros for tokens of no chunk."""
    places = x.shape[0] * CHUNK
    place = jnp.full(tokens, places, jnp.int32).at[rows.reshape(-1)].set(jnp.arange(places, dtype=jnp.int32), mode="drop")
    return x.reshape(places, *x.shape[2:]).at[place].get(mode="fill", fill_value=0)


def positions(table: Chunks, rows: Int32[Array, "chunks L"], tokens: int) -> Int32[Array, " T"]:
    """Each token's place in its sequence; -1 for tokens of no sequence."""
    within = table.index[:, None] * CHUNK + jnp.arange(1, CHUNK + 1, dtype=jnp.int32)[None]
    return to_tokens(within, rows, tokens) - 1


def convolve_row(
    qkv: Float[Array, "T C"],
    conv: Float[Array, "C W"],
    tail: Float[Array, "S tail C"],
    starts: Int32[Array, " S"],
    lengths: Int32[Array, " S"],
    position: Int32[Array, " T"],
) -> Float32[Array, "T C"]:
    """Convolution and SiLU of a packed row, to be differentiated.

    The convolution is over the row, less what lies before a token's own sequence; the few tokens that see the tail get it added.
    """
    (T, C), W, inputs = qkv.shape, conv.shape[1], tail.shape[1]
    taps, x, before = conv.astype(jnp.float32).T, qkv.astype(jnp.float32), tail.astype(jnp.float32)
    linear = jnp.zeros((T, C), jnp.float32)
    for back in range(W):
        shifted = jnp.pad(x, ((back, 0), (0, 0)))[:T]
        linear += jnp.where((position >= back)[:, None], shifted, 0.0) * taps[W - 1 - back][None]
    for i in range(inputs):
        seen = sum(before[:, inputs + i - back] * taps[W - 1 - back][None] for back in range(i + 1, W))
        linear = linear.at[jnp.where(i < lengths, starts + i, T)].add(seen, mode="drop")
    return jax.nn.silu(linear)
