"""Layer states: their bytes, growth, and copies of pages and slots; every kind of layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.paged_attention import PAGE
from minicpmv46_jax.model.layer_kinds import LAYER_KINDS
from minicpmv46_jax.model.state import (
    empty_state,
    offload_pages,
    offload_slot,
    page_bytes,
    restore_pages,
    restore_slot,
    slot_bytes,
)


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_page_and_slot_bytes_equal_array_bytes(demo, kind, dtype):
    state, dtype = LAYER_KINDS[kind].state, jnp.dtype(dtype)
    sizes = state.page_bytes(demo.config.text, dtype.itemsize), state.slot_bytes(demo.config.text, dtype.itemsize)
    for pages, slots in ((1, 0), (0, 1), (5, 3)):
        arrays = jax.tree.leaves(state.empty(demo.config.text, pages=pages, slots=slots, dtype=dtype))
        assert sum(x.nbytes for x in arrays) == pages * sizes[0] + slots * sizes[1]
    assert any(sizes)


def test_bytes_of_all_layers(demo):
    text = demo.config.text
    layers = empty_state(text, 2, 7, jnp.dtype("float32"), max_pages=7, snapshots=1).layers
    assert sum(x.nbytes for x in jax.tree.leaves(layers)) == 7 * page_bytes(text, 4) + 3 * slot_bytes(text, 4)


def test_restored_pages_and_slots_equal_the_offloaded_ones(demo):
    """All that another sequence's pages and slots hold stays as it was."""
    sizes = {"sequences": 3, "pages": 6, "dtype": jnp.dtype("float32"), "max_pages": 6}
    source, target = (random_like(empty_state(demo.config.text, **sizes).layers, seed) for seed in (0, 1))
    copy = offload_pages(source, jnp.array([4, -1, 1])), offload_slot(source, jnp.int32(2))
    pages = restore_pages(target, jnp.array([0, -1, 5]), copy[0])
    both = restore_slot(pages, jnp.int32(1), copy[1])
    for old, before, after in zip(*map(jax.tree.leaves, (source, target, both)), strict=True):
        expected = np.array(before)
        if old.shape[1] == PAGE:
            expected[[0, 5]] = old[np.array([4, 1])]
        else:
            expected[1] = old[2]
        np.testing.assert_array_equal(after, expected)
