"""Copies of prefixes between the device and host memory, and the programs that read and write them.

Programs copy pages in groups of a few fixed sizes, so few programs are compiled. A group is padded with -1.
Glossary: P pages of a group.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from minicpmv46_jax.generation.decoding import DecodeState
from minicpmv46_jax.model.batch import scatter_index
from minicpmv46_jax.model.state import GatedDeltaState, KeyValues, Layers

GROUP_SIZES = (8, 32)  # pages per copy program: 6 and 24 MB of the released model


@dataclasses.dataclass(eq=False)
class OffloadedPrefix:
    """A prefix on its way to host memory, or already there.

    Attributes:
      pages: for each group of pages, the keys and values per layer.
      recurrent_state: recurrent and conv state per layer, after the prefix's last token.
    """

    pages: list[list[KeyValues]]
    recurrent_state: list[GatedDeltaState]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in jax.tree.leaves((self.pages, self.recurrent_state)))

    def finish(self) -> None:
        """Waits until the copy is in host memory, then frees the device's arrays."""
        jax.block_until_ready((self.pages, self.recurrent_state))
        self.pages, self.recurrent_state = jax.tree.map(_to_host, (self.pages, self.recurrent_state))


def page_groups(pages: Sequence[int]) -> list[Int32[np.ndarray, " P"]]:
    """Splits pages into groups of the largest size and one of the smallest that suffices, padded with -1."""
    largest = GROUP_SIZES[-1]
    parts = [pages[at : at + largest] for at in range(0, len(pages), largest)]
    sizes = (next(size for size in GROUP_SIZES if size >= len(part)) for part in parts)
    return [np.array([*part, *[-1] * (size - len(part))], np.int32) for part, size in zip(parts, sizes, strict=True)]


def offload_pages(layers: Layers, pages: Int32[Array, " P"]) -> list[KeyValues]:
    """Returns keys and values of a group of pages per layer; entries for page -1 are undefined."""
    sources = jnp.maximum(pages, 0)
    return [KeyValues(layer.keys[sources], layer.values[sources]) for layer in layers if isinstance(layer, KeyValues)]


def offload_recurrent_state(layers: Layers, slot: Int32[Array, ""]) -> list[GatedDeltaState]:
    """Returns a slot's recurrent and conv state per layer."""
    return [
        GatedDeltaState(layer.recurrent_state[slot], layer.conv_state[slot])
        for layer in layers
        if isinstance(layer, GatedDeltaState)
    ]


def restore_pages(decode_state: DecodeState, pages: Int32[Array, " P"], values: list[KeyValues]) -> DecodeState:
    """Writes keys and values that `offload_pages` returned into these pages; skips page -1."""
    layers = _layers(decode_state, KeyValues)
    targets = scatter_index(pages, layers[0].keys.shape[0])
    new = jax.tree.map(lambda x, value: x.at[targets].set(value, mode="drop"), layers, values)
    return _with_layers(decode_state, KeyValues, new)


def restore_recurrent_state(decode_state: DecodeState, slot: Int32[Array, ""], values: list[GatedDeltaState]) -> DecodeState:
    """Writes the state that `offload_recurrent_state` returned into a slot."""
    layers = _layers(decode_state, GatedDeltaState)
    return _with_layers(decode_state, GatedDeltaState, jax.tree.map(lambda x, value: x.at[slot].set(value), layers, values))


def _layers(decode_state: DecodeState, kind: type) -> list:
    return [layer for layer in decode_state.state.layers if isinstance(layer, kind)]


def _with_layers(decode_state: DecodeState, kind: type, new: list) -> DecodeState:
    """Replaces the layers of one kind."""
    rest = iter(new)
    layers = tuple(next(rest) if isinstance(layer, kind) else layer for layer in decode_state.state.layers)
    return dataclasses.replace(decode_state, state=dataclasses.replace(decode_state.state, layers=layers))


def _to_host(x: Array) -> np.ndarray:
    """Copies an array to host memory, then yields the GIL: on a GPU a copy holds it 0.1 to 0.8 ms per MB."""
    copy = np.asarray(x)
    time.sleep(0)
    return copy
