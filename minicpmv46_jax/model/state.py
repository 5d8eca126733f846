"""State of sequences between calls: the layers' states in pages and slots, and the sequences' block tables.

A sequence holds one slot and as many pages of 64 tokens as it needs; its row of `block_tables` lists the
pages. There may be more slots than sequences: the additional slots hold snapshots, from which a sequence
with the same prefix can start. All classes are frozen, and functions return new ones. Jitted steps donate
the old one, so the arrays are updated in place.
Glossary: S sequences, P pages of a copy, M pages a sequence may have.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int32

from kernels_pallas.paged_attention import PAGE
from minicpmv46_jax.config import TextConfig
from minicpmv46_jax.model.layer_kinds import LAYER_KINDS
from minicpmv46_jax.model.layer_state import LayerState
from minicpmv46_jax.trees import tree_dataclass

Layers = tuple[LayerState, ...]


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
      pages: number of pages, shared by all sequences.
      dtype: dtype of keys, values and conv states; recurrent states are always float32.
      max_pages: M, pages of one sequence.
      snapshots: slots beyond those of the sequences.
    """
    sizes = {"pages": pages, "slots": sequences + snapshots, "dtype": dtype}
    layers = tuple(LAYER_KINDS[kind].state.empty(config, **sizes) for kind in config.layer_types)
    block_tables = jnp.full((sequences, max_pages), -1, jnp.int32)
    return TextState(layers, block_tables, jnp.zeros(sequences, jnp.int32))


def grow_state(state: TextState, pages: int) -> TextState:
    """Grows the state of one sequence to `pages` pages, all of them the sequence's own."""
    layers = tuple(layer.grow(pages) for layer in state.layers)
    return TextState(layers, jnp.arange(pages, dtype=jnp.int32)[None], state.seq_lens)


def page_bytes(config: TextConfig, itemsize: int) -> int:
    """Returns the bytes of one page (64 tokens) in all layers."""
    return sum(LAYER_KINDS[kind].state.page_bytes(config, itemsize) for kind in config.layer_types)


def slot_bytes(config: TextConfig, itemsize: int) -> int:
    """Returns the bytes of one slot in all layers."""
    return sum(LAYER_KINDS[kind].state.slot_bytes(config, itemsize) for kind in config.layer_types)


def offload_pages(layers: Layers, pages: Int32[Array, " P"]) -> list[Any]:
    """Returns a copy of these pages per layer; entries for page -1 are undefined."""
    return [layer.offload_pages(pages) for layer in layers]


def restore_pages(layers: Layers, pages: Int32[Array, " P"], values: list[Any]) -> Layers:
    """Writes a copy made by `offload_pages` to these pages; skips page -1."""
    return tuple(layer.restore_pages(pages, value) for layer, value in zip(layers, values, strict=True))


def offload_slot(layers: Layers, slot: Int32[Array, ""]) -> list[Any]:
    """Returns a copy of a slot per layer."""
    return [layer.offload_slot(slot) for layer in layers]


def restore_slot(layers: Layers, slot: Int32[Array, ""], values: list[Any]) -> Layers:
    """Writes a copy made by `offload_slot` to a slot."""
    return tuple(layer.restore_slot(slot, value) for layer, value in zip(layers, values, strict=True))


def pages_of(tokens: int) -> int:
    """Returns the number of pages that hold `tokens` tokens."""
    return -(-tokens // PAGE)
