"""Name scopes of the model's parts, which profiles show."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from minicpmv46_jax import model
from minicpmv46_jax.generation.decoding import decode, new_decode_state
from minicpmv46_jax.generation.generate import single_prefill_input
from minicpmv46_jax.model import packing
from minicpmv46_jax.model.state import empty_state
from tests.jaxprs import equations


def scopes(f, *arguments):
    return {scope for _, names in equations(jax.make_jaxpr(f)(*arguments)) for scope in names}


def test_steps_have_a_scope_for_each_part(demo, photos):
    graph, text = model.schema(demo.config), demo.config.text
    state = empty_state(text, 1, 8, jnp.dtype("float32"), max_pages=8)
    layers = {"embed", "input_norm", "attention", "gated_delta_net", "mlp_norm", "mlp", "norm", "logits"}

    ids, rows = np.zeros(5, np.int32), np.full(5, -1, np.int32)
    inputs = jax.tree.map(jnp.asarray, single_prefill_input(ids, rows, 64, 0, 8))
    prefill = functools.partial(model.prefill, graph.text)
    assert layers <= scopes(prefill, demo.params["text"], state, inputs, jnp.zeros((1, text.hidden_size)))

    decode_state = new_decode_state(state, text.vocab_size)
    step = functools.partial(decode, graph.text, steps=2, mode="filtered")
    new_pages = jnp.full((1, 2), -1, jnp.int32)
    assert layers | {"sampling"} <= scopes(step, demo.params["text"], decode_state, jnp.zeros(1, jnp.int32), new_pages)

    message = {"role": "user", "content": [{"type": "image", "image": photos[0].resize((64, 64))}]}
    ((_, packed),) = packing.pack(demo.process([message]).views, demo.config.vision.positions_per_side)
    encode = functools.partial(model.encode, graph.vision)
    vision = {"patch_embed", "layers", "attention", "mlp", "window_merger", "merger"}
    assert vision <= scopes(encode, demo.params["vision"], jax.tree.map(jnp.asarray, packed))
