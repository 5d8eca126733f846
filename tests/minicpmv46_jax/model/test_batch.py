"""Batches: rotary positions and cache positions are separate."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas.paged_attention import PAGE
from minicpmv46_jax.model.attention import Attention, KeyValues
from minicpmv46_jax.model.batch import PrefillBatch
from tests.tolerances import FLOAT32_ONE_OP, relative_rms


def test_rope_positions_do_not_move_keys_in_pages(demo, monkeypatch):
    """Shifted rotary positions change the keys but neither their pages nor, as rotary is relative, the
    output.
    """
    config, T = demo.config.text, 100
    attention = Attention(config, rngs=nnx.Rngs(0))
    empty = jnp.zeros((3, PAGE, config.num_key_value_heads * config.head_dim))
    one = np.zeros(1, np.int32)
    snapshots = np.zeros((0, 2), np.int32), np.zeros(0, np.int32)
    batch = PrefillBatch(one, one + T, one, one, one - 1, np.array([[2, 0]], np.int32), *snapshots)
    x = jax.random.normal(jax.random.key(0), (T, config.hidden_size))
    batch = jax.tree.map(jnp.asarray, batch)
    expected, state = attention(x, KeyValues(empty, empty), batch)
    cache_positions = PrefillBatch.cache_positions
    monkeypatch.setattr(PrefillBatch, "rope_positions", lambda self, tokens: cache_positions(self, tokens) + 5)
    found, shifted = attention(x, KeyValues(empty, empty), batch)
    np.testing.assert_array_equal(shifted.values, state.values)
    np.testing.assert_array_equal(np.any(shifted.keys != 0, axis=-1), np.any(state.keys != 0, axis=-1))
    assert relative_rms(shifted.keys, state.keys) > 0.1
    assert relative_rms(found, expected) < 10 * FLOAT32_ONE_OP
