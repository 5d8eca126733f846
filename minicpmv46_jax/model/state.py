"""State of sequences between calls: keys and values in pages, recurrent and conv states in slots.

A sequence holds one slot and as many pages of 64 tokens as it needs; its row of `block_tables` lists the
pages. There may be more slots than sequences: the additional slots hold snapshots, from which a sequence
with the same prefix can start. All classes are frozen, and functions return new ones. Jitted steps donate
the old one, so the arrays are updated in place.
Glossary: S sequences, s slots (at least S), P pages, M pages a sequence may have, N heads, V and K widths.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.paged_attention import PAGE
from minicpmv46_jax.config import TextConfig
from minicpmv46_jax.trees import tree_dataclass


@tree_dataclass
class KeyValues:
    """Keys and values of one full-attention layer; a token's heads are concatenated."""

    keys: Float[Array, "P page KH"]
    values: Float[Array, "P page KH"]


@tree_dataclass
class GatedDeltaState:
    """Recurrent and conv state of one gated-delta layer; its size is independent of sequence lengths."""

    recurrent_state: Float32[Array, "s N V K"]
    conv_state: Float[Array, "s tail C"]


Layers = tuple[KeyValues | GatedDeltaState, ...]


@tree_dataclass
class TextState:
    """State of all sequences.

    Attributes:
      layers: one state per layer, in the model's order.
      block_tables: each sequence's pages; -1 for none.
      seq_lens: tokens of each sequence so far.
    """

    layers: Layers
    block_tables: Int32[Array, "S M"]
    seq_lens: Int32[Array, " S"]


def empty_state(
    config: TextConfig, sequences: int, pages: int, dtype: jnp.dtype, *, max_pages: int, snapshots: int = 0
) -> TextState:
    """Creates the state of sequences without tokens.

    Args:
      config: the text backbone.
      sequences: S.
      pages: P, shared by all sequences.
      dtype: dtype of keys, values and conv states; recurrent states are always float32.
      max_pages: M, pages of one sequence.
      snapshots: slots beyond those of the sequences.
    """

    def layer(kind: str) -> KeyValues | GatedDeltaState:
        if kind == "full_attention":
            shape = (pages, PAGE, config.num_key_value_heads * config.head_dim)
            return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        slots = sequences + snapshots
        heads = (slots, config.linear_num_value_heads, config.linear_value_head_dim, config.linear_key_head_dim)
        conv_state = (slots, config.linear_conv_kernel_dim - 1, config.linear_conv_dim)
        return GatedDeltaState(jnp.zeros(heads, jnp.float32), jnp.zeros(conv_state, dtype))

    block_tables = jnp.full((sequences, max_pages), -1, jnp.int32)
    return TextState(tuple(layer(kind) for kind in config.layer_types), block_tables, jnp.zeros(sequences, jnp.int32))


def pages_of(tokens: int) -> int:
    """Returns the number of pages that hold `tokens` tokens."""
    return -(-tokens // PAGE)
