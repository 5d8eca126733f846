"""Packing: block order, position ids as in transformers, bucket sizes, passes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_nearest_position_ids, get_vision_window_index

from minicpmv46_jax.model import packing
from minicpmv46_jax.model.vision import pixel_values
from minicpmv46_jax.processing import View


@given(h=st.integers(1, 8), w=st.integers(1, 8), merges=st.integers(1, 3))
def test_block_order_nests_2x2_windows(h, w, merges):
    h, w = h << merges, w << merges
    order = packing.block_order(h, w, merges)
    assert sorted(order) == list(range(h * w))
    rows, columns = order // w, order % w
    for merge in range(1, merges + 1):
        side, size = 2**merge, 4**merge
        corners = (rows // side) * w + columns // side
        assert (corners.reshape(-1, size) == corners.reshape(-1, size)[:, :1]).all()
    window = slice(0, 4)
    assert (rows[window].tolist(), columns[window].tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])


def test_block_order_equals_reference_window_index():
    index, _ = get_vision_window_index(torch.tensor([[1, 6, 10]]), spatial_merge_size=1, window_size=2, patch_size=1)
    np.testing.assert_array_equal(packing.block_order(6, 10, 1), index.numpy())


# 70 is the released side. Some sides cannot be tested, because torch.arange rounds their boundaries
# differently for different vector widths.
@pytest.mark.parametrize("side", [70, 16, 32])
def test_nearest_positions_equal_reference(side):
    for n in range(1, 4 * side):
        expected = get_vision_nearest_position_ids(torch.tensor([[n, 3]]), side).numpy()
        np.testing.assert_array_equal(packing.nearest_positions(n, 3, side).reshape(-1), expected)


@pytest.mark.parametrize(("h", "w"), [(6, 8), (8, 6), (7, 8)])
def test_block_order_rejects_grid_that_cannot_be_merged(h, w):
    with pytest.raises(ValueError, match=f"{h} x {w}"):
        packing.block_order(h, w, 2)


@given(st.integers(1, 10**6))
@settings(deadline=None)
def test_bucket_sizes_are_few_and_pad_at_most_an_eighth(size):
    bucket = packing.bucket_size(size)
    assert size <= bucket <= max(64, size * 9 / 8 + 8)
    assert bucket % 8 == 0
    assert len({packing.bucket_size(s) for s in range(1, 4097)}) <= 8 * math.log2(4096 / 64) + 1


TABLE = np.linspace(-1, 1, 256, dtype=np.float32)[None].repeat(3, axis=0)


def view(h, w, mode="16x", value=0):
    return View(np.full((h * w, 6), value, np.uint8), (h, w), TABLE, 0, h * w >> 2 * packing.MERGES[mode], mode)


def test_passes_contain_each_view_once_and_one_mode():
    views = [view(8, 8, value=1), view(4, 12, value=2), view(8, 8, "4x", 3), view(40, 40, value=4), view(4, 4, value=5)]
    passes = list(packing.pack(views, 70, limit=1000))
    assert [i for group, _ in passes for i in group] == list(range(5))
    for group, packed in passes:
        assert {views[i].downsample_mode for i in group} == {packed.downsample_mode}
        for slot, i in enumerate(group):
            rows = packed.patches[packed.view_starts[slot] : packed.view_starts[slot] + packed.view_lens[slot]]
            assert (rows == i + 1).all()
        assert (packed.view_starts[len(group) :] == len(packed.patches)).all()
        assert packed.view_lens.max() <= packed.max_view_len


def test_pixel_values_equal_the_processors(photos, demo):
    parts = [{"type": "image", "image": photo} for photo in photos]
    views = demo.process([{"role": "user", "content": parts}]).views
    for group, packed in packing.pack(views, 70):
        found = np.asarray(pixel_values(jax.tree.map(jnp.asarray, packed)))
        for slot, i in enumerate(group):
            order = packing.block_order(*views[i].grid, 2)
            expected = views[i].pixel_values[order]
            np.testing.assert_allclose(found[packed.view_starts[slot] :][: len(order)], expected, rtol=0, atol=1.2e-7)
