"""Copies of prefixes between the device and host memory, and the programs that read and write them.

Programs copy pages in groups of a few fixed sizes, so few programs are compiled. A group is padded with -1.
Glossary: P pages of a group.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32

from minicpmv46_jax.generation.decoding import DecodeState
from minicpmv46_jax.model import state
from minicpmv46_jax.model.state import Layers

GROUP_SIZES = (8, 32)  # pages per copy program: 6 and 24 MB of the released model


@dataclasses.dataclass(eq=False)
class OffloadedPrefix:
    """A prefix on its way to host memory, or already there.

    Attributes:
      pages: for each group of pages, the copy per layer; None for layers without pages.
      slot: the slot's copy per layer, after the prefix's last token; None for layers without slots.
    """

    pages: list[list[Any]]
    slot: list[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in jax.tree.leaves((self.pages, self.slot)))

    def finish(self) -> None:
        """Waits until the copy is in host memory, then frees the device's arrays."""
        jax.block_until_ready((self.pages, self.slot))
        self.pages, self.slot = jax.tree.map(_to_host, (self.pages, self.slot))


def page_groups(pages: Sequence[int]) -> list[Int32[np.ndarray, " P"]]:
    """Splits pages into groups of the largest size and one of the smallest that suffices, padded with -1."""
    largest = GROUP_SIZES[-1]
    parts = [pages[at : at + largest] for at in range(0, len(pages), largest)]
    sizes = (next(size for size in GROUP_SIZES if size >= len(part)) for part in parts)
    return [np.array([*part, *[-1] * (size - len(part))], np.int32) for part, size in zip(parts, sizes, strict=True)]


def restore_pages(decode_state: DecodeState, pages: Int32[Array, " P"], values: list[Any]) -> DecodeState:
    """Writes a copy made by `state.offload_pages` to these pages; skips page -1."""
    return _with_layers(decode_state, state.restore_pages(decode_state.state.layers, pages, values))


def restore_slot(decode_state: DecodeState, slot: Int32[Array, ""], values: list[Any]) -> DecodeState:
    """Writes a copy made by `state.offload_slot` to a slot."""
    return _with_layers(decode_state, state.restore_slot(decode_state.state.layers, slot, values))


def _with_layers(decode_state: DecodeState, layers: Layers) -> DecodeState:
    return dataclasses.replace(decode_state, state=dataclasses.replace(decode_state.state, layers=layers))


def _to_host(x: Array) -> np.ndarray:
    """Copies an array to host memory, then yields the GIL: on a GPU a copy holds it 0.1 to 0.8 ms per MB."""
    copy = np.asarray(x)
    time.sleep(0)
    return copy
