"""Base class of layer states: creation, sizes, growth, and copies of pages and slots.

Each layer kind defines its state beside its mixer and lists both in `layer_kinds.LAYER_KINDS`. A state keeps
arrays with one entry per page, arrays with one entry per slot, or both. The defaults here are those of a
state without pages or without slots.
Glossary: P pages of a copy.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int32

from minicpmv46_jax.config import TextConfig


class LayerState:
    """State of one layer for all sequences; a frozen pytree, whose methods return new ones."""

    @classmethod
    def empty(cls, config: TextConfig, *, pages: int, slots: int, dtype: jnp.dtype) -> "LayerState":
        """Creates a state of zeros.

        Args:
          config: the text backbone.
          pages: number of pages, shared by all sequences.
          slots: number of slots, those of snapshots included.
          dtype: dtype of everything that is not always float32.
        """
        raise NotImplementedError

    @classmethod
    def page_bytes(cls, config: TextConfig, itemsize: int) -> int:
        """Returns the bytes of one page, for a dtype of `itemsize` bytes."""
        return 0

    @classmethod
    def slot_bytes(cls, config: TextConfig, itemsize: int) -> int:
        """Returns the bytes of one slot, for a dtype of `itemsize` bytes."""
        return 0

    def grow(self, pages: int) -> "LayerState":
        """Grows the state to `pages` pages; new pages are zeros."""
        return self

    def offload_pages(self, pages: Int32[Array, " P"]) -> Any:
        """Returns a copy of these pages, None without pages; entries for page -1 are undefined."""
        return None

    def restore_pages(self, pages: Int32[Array, " P"], values: Any) -> "LayerState":
        """Writes a copy made by `offload_pages` to these pages; skips page -1."""
        return self

    def offload_slot(self, slot: Int32[Array, ""]) -> Any:
        """Returns a copy of a slot, or None for a state without slots."""
        return None

    def restore_slot(self, slot: Int32[Array, ""], values: Any) -> "LayerState":
        """Writes a copy made by `offload_slot` to a slot."""
        return self
