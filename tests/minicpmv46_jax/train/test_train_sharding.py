"""Data parallel and fully sharded steps on eight virtual devices, against one device that accumulates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from minicpmv46_jax import sharding
from minicpmv46_jax.processing import Processor
from minicpmv46_jax.train import BatchShape, Conversation, make_step, new_state, pack, place, split, stack
from tests.minicpmv46_jax.train.train_compile import QUICK
from tests.tolerances import relative_rms

SHAPE = BatchShape(rows=1, tokens=64, patches=80, views=1, longest=80)


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.full)], ids=["text", "pictures"])
def parts(request, demo, photos):
    """Returns eight batches of different lengths; in the second case every other one has a picture."""
    small = dataclasses.replace(demo.processor.image_config, scale_resolution=112)
    processor = Processor(demo.processor.tokenizer, small, demo.processor.video_config)

    def part(i):
        picture = [{"type": "image", "image": photos[0].resize((60 + i, 60))}] if request.param and i % 2 else []
        inputs = processor([{"role": "user", "content": [*picture, {"type": "text", "text": "?" * i}]}], max_slice_nums=1)
        shape = SHAPE if request.param else BatchShape(rows=1, tokens=64)
        return pack([[Conversation(inputs, np.ones(len(inputs.token_ids), bool))]], shape, demo.config.vision)

    return [part(i) for i in range(8)]


def two_steps(demo, batch, mesh):
    optimizer = optax.sgd(1e-3)
    state = new_state(*split(demo.params, lambda path: True), optimizer)
    state = state if mesh is None else place(state, mesh)
    step = jax.jit(make_step(demo.config, optimizer, dtype=jnp.float32, mesh=mesh, z_loss=1e-3), compiler_options=QUICK)
    first = None
    for _ in range(2):
        state, metrics = step(state, batch)
        first = first or metrics
    assert step._cache_size() == 1  # a step's output is sharded like its input
    return state, first, metrics


def test_eight_devices_train_like_one(demo, parts):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    state, *metrics = two_steps(demo, stack(parts, devices=8), mesh)
    expected, *expected_metrics = two_steps(demo, stack(parts), None)
    for found, one in zip(jax.tree.leaves(metrics), jax.tree.leaves(expected_metrics), strict=True):
        assert abs(found - one) <= 2e-5 * abs(one)
    for found, one in zip(jax.tree.leaves(state.trained), jax.tree.leaves(expected.trained), strict=True):
        assert relative_rms(found, one) < 1e-5
    weight = state.trained["text"]["layers"][0]["mlp"]["up_proj"]["weight"]
    assert weight.sharding.spec == P("fsdp")
    assert weight.addressable_shards[0].data.shape == (weight.shape[0] // 4, weight.shape[1])


def test_mesh_needs_enough_devices():
    with pytest.raises(ValueError, match="data = 3 and fsdp = 4 needs 12 devices, there are 8"):
        sharding.make_mesh(data=3, fsdp=4)
