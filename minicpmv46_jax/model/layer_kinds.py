"""The kinds of layers: one entry per name in config.json's `layer_types`.

A new kind needs a module with its mixer and its state, an entry here, and its kernel.
"""

from typing import Any, NamedTuple

from minicpmv46_jax.model.attention import Attention, KeyValues
from minicpmv46_jax.model.gated_delta_net import GatedDeltaNet, GatedDeltaState
from minicpmv46_jax.model.layer_state import LayerState


class LayerKind(NamedTuple):
    """Classes of a layer kind.

    Attributes:
      scope: name of the mixer in profiles.
      mixer: (config, *, backend, rngs) -> module (x, state, batch) -> (out, state).
      state: class of the layer's state.
    """

    scope: str
    mixer: type[Any]
    state: type[LayerState]


LAYER_KINDS = {
    "full_attention": LayerKind("attention", Attention, KeyValues),
    "linear_attention": LayerKind("gated_delta_net", GatedDeltaNet, GatedDeltaState),
}
