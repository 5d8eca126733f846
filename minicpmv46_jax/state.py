"""What a sequence remembers between calls: one entry a layer, and how many tokens it has seen.

Frozen; every function returns a new one. The jitted steps donate the old one, so the arrays are updated in place.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from minicpmv46_jax.config import TextConfig
from minicpmv46_jax.trees import tree_dataclass


@tree_dataclass
class KeyValues:
    """Keys and values of one full-attention layer; slot s holds the token at position s."""

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K H"]


@tree_dataclass
class DeltaState:
    """Memory of one gated-delta layer: its size does not depend on the length of the sequence."""

    memory: Float32[Array, "B N V K"]
    conv_tail: Float[Array, "B tail C"]


@tree_dataclass
class TextState:
    """All of a batch of sequences: `layers` in the model's order, `length` the tokens seen so far."""

    layers: tuple[KeyValues | DeltaState, ...]
    length: Int32[Array, " B"]


def empty_state(config: TextConfig, batch: int, capacity: int, dtype: jnp.dtype) -> TextState:
    """Sequences that have seen nothing.

    Args:
      config: the text backbone.
      batch: sequences B.
      capacity: tokens each may come to hold, S.
      dtype: of keys, values and convolution inputs; the gated-delta memory is float32 always.
    """

    def layer(kind: str) -> KeyValues | DeltaState:
        if kind == "full_attention":
            shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
            return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        heads = (batch, config.linear_num_value_heads, config.linear_value_head_dim, config.linear_key_head_dim)
        tail = (batch, config.linear_conv_kernel_dim - 1, config.linear_conv_dim)
        return DeltaState(jnp.zeros(heads, jnp.float32), jnp.zeros(tail, dtype))

    return TextState(tuple(layer(kind) for kind in config.layer_types), jnp.zeros(batch, jnp.int32))
