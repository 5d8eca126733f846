"""Compiles the steps for a TPU and prints their memory and kernels as JSON.

The sizes are the released ones, or the demo model's with `demo`.

test_compile_tpu.py runs it: `python -m tests.minicpmv46_jax.compile_steps v5e:1x1 [demo]`.
"""

import functools
import json
import os
import re
import sys
from collections.abc import Callable

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from minicpmv46_jax import demo, model
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.generation import generate
from minicpmv46_jax.generation.decoding import decode, new_decode_state
from minicpmv46_jax.model import packing
from minicpmv46_jax.model.batch import PrefillBatch
from minicpmv46_jax.model.state import TextState, empty_state
from tests.released import released_config

SLOTS, PAGES, BLOCK, CHUNKS, PATCHES, VIEWS = 8, 64, 256, 4, 7168, 8


def bytes_of(tree: object) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled(mesh: Mesh, state: TextState | None, f: Callable, *args: object, **jit: object) -> dict[str, int | list[str]]:
    with jax.set_mesh(mesh):
        lowered = jax.jit(f, **jit).trace(*args).lower(lowering_platforms=("tpu",))
        memory = lowered.compile().memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "state": bytes_of(state),
        "kernels": sorted(set(re.findall(r'kernel_name = "(\w+)"', lowered.as_text()))),
    }


def state_like(state: TextState) -> TextState:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)


def main(topology: str, config: ModelConfig) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, chips_per_host_bounds=(1, 1, 1)).devices
    mesh = Mesh(np.array(devices), ("chip",))
    dtype, shape = jnp.bfloat16, jax.ShapeDtypeStruct
    graph = model.schema(config)  # on a TPU, None selects the kernels
    params = jax.tree.map(lambda s: shape(s.shape, dtype), model.parameter_shapes(config))
    state = jax.eval_shape(lambda: empty_state(config.text, SLOTS, PAGES, dtype, max_pages=PAGES, snapshots=SLOTS))
    decoding = jax.eval_shape(lambda: new_decode_state(state_like(state), config.text.vocab_size))
    decode_rows = functools.partial(decode, graph.text, steps=generate.STEPS_PER_DISPATCH, mode="greedy")
    numbers = functools.partial(shape, dtype=jnp.int32)
    inputs = model.PrefillInput(
        ids=numbers((BLOCK,)),
        feature_rows=numbers((BLOCK,)),
        batch=PrefillBatch(
            *[numbers((CHUNKS,))] * 5,
            block_tables=numbers((CHUNKS, PAGES)),
            snapshots=numbers((CHUNKS, 2)),
            snapshot_slots=numbers((CHUNKS,)),
        ),
    )
    features = shape((PATCHES, config.text.hidden_size), dtype)
    views = packing.PackedViews(
        patches=shape((PATCHES, config.vision.patch_dim), jnp.uint8),
        scale=shape((PATCHES, config.vision.num_channels), jnp.float32),
        offset=shape((PATCHES, config.vision.num_channels), jnp.float32),
        position_ids=shape((PATCHES,), jnp.int32),
        view_starts=shape((VIEWS,), jnp.int32),
        view_lens=shape((VIEWS,), jnp.int32),
        max_view_len=1088,
        downsample_mode="16x",
    )
    rows = numbers((SLOTS,)), numbers((SLOTS, 2))
    prefill = functools.partial(model.prefill, graph.text)
    steps = {
        "decode": compiled(mesh, decoding, decode_rows, params["text"], decoding, *rows, donate_argnums=1),
        "prefill": compiled(mesh, state, prefill, params["text"], state, inputs, features, donate_argnums=1),
        "encode": compiled(mesh, None, functools.partial(model.encode, graph.vision), params["vision"], views),
    }
    print(json.dumps(steps))


if __name__ == "__main__":
    main(sys.argv[1], ModelConfig.from_folder(demo.FOLDER) if "demo" in sys.argv else ModelConfig.from_dict(released_config()))
