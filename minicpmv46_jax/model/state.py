"""What sequences remember between calls: keys and values in pages, gated-delta memory in slots.

A sequence holds a slot, and as many pages of 64 tokens as it has need of; its row of `tables` names them. There may be more slots
of memory than sequences: the others keep snapshots, from which a sequence with the same beginning may start.
Frozen; every function returns a new one. The jitted steps donate the old one, so the arrays are updated in place.
Glossary: S sequences, s slots of memory (at least S), P pages, M pages a sequence may have.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.paged_attention import PAGE
from minicpmv46_jax.config import TextConfig
from minicpmv46_jax.trees import tree_dataclass


@tree_dataclass
class KeyValues:
    """Keys and values of one full-attention layer; a token's heads side by side."""

    keys: Float[Array, "P page KH"]
    values: Float[Array, "P page KH"]


@tree_dataclass
class DeltaState:
    """Memory of one gated-delta layer: its size does not depend on the length of the sequence."""

    memory: Float32[Array, "s N V K"]
    conv_tail: Float[Array, "s tail C"]


Layers = tuple[KeyValues | DeltaState, ...]


@tree_dataclass
class TextState:
    """All sequences: `layers` in the model's order, each sequence's pages (-1: none), and how many tokens it has seen."""

    layers: Layers
    tables: Int32[Array, "S M"]
    lengths: Int32[Array, " S"]


def empty_state(
    config: TextConfig, sequences: int, pages: int, dtype: jnp.dtype, *, longest: int, snapshots: int = 0
) -> TextState:
    """Sequences that have seen nothing.

    Args:
      config: the text backbone.
      sequences: S.
      pages: P, shared by all sequences.
      dtype: of keys, values and convolution inputs; the gated-delta memory is float32 always.
      longest: M, pages of one sequence.
      snapshots: slots of memory beyond those of the sequences.
    """

    def layer(kind: str) -> KeyValues | DeltaState:
        if kind == "full_attention":
            shape = (pages, PAGE, config.num_key_value_heads * config.head_dim)
            return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        slots = sequences + snapshots
        heads = (slots, config.linear_num_value_heads, config.linear_value_head_dim, config.linear_key_head_dim)
        tail = (slots, config.linear_conv_kernel_dim - 1, config.linear_conv_dim)
        return DeltaState(jnp.zeros(heads, jnp.float32), jnp.zeros(tail, dtype))

    tables = jnp.full((sequences, longest), -1, jnp.int32)
    return TextState(tuple(layer(kind) for kind in config.layer_types), tables, jnp.zeros(sequences, jnp.int32))


def pages_of(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)
