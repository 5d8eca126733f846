"""An explicit backend reaches every operation: with "reference" no step contains a kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.backends import mosaic_unsupported_reason
from minicpmv46_jax import model
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.generation import sampling
from minicpmv46_jax.generation.decoding import (
    FirstTokenInput,
    decode,
    new_decode_state,
    sample_first,
    sample_held,
    sampling_params,
)
from minicpmv46_jax.generation.generate import Generator
from minicpmv46_jax.model import packing
from minicpmv46_jax.model.batch import PrefillBatch
from minicpmv46_jax.model.state import empty_state
from minicpmv46_jax.processing import Inputs
from tests.released import released_config

SLOTS, PAGES, TOKENS, PATCHES, VIEWS = 2, 8, 128, 1088, 1
DEVICES = {
    "tpu": jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
    "cuda": jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"),
}
CUSTOM_CALLS = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}
SAMPLING = {"sample_first", "sample_held"}  # a step of its own; there is no kernel for TPUs
needs_mosaic = pytest.mark.skipif(mosaic_unsupported_reason() is not None, reason="jax has another Mosaic GPU")


def cut_config():
    """Returns the released sizes with four text and two vision layers."""
    raw = released_config()
    raw["text_config"].update(num_hidden_layers=4, layer_types=raw["text_config"]["layer_types"][:4])
    raw["vision_config"]["num_hidden_layers"] = 2
    raw["insert_layer_id"] = 0
    return ModelConfig.from_dict(raw)


def steps(backend):
    """Returns (function, abstract arguments) of every step that the generator and the server run."""
    config, shape = cut_config(), jax.ShapeDtypeStruct
    numbers, dtype = functools.partial(shape, dtype=jnp.int32), jnp.dtype("bfloat16")
    graph = model.schema(config, backend)
    params = jax.tree.map(lambda s: shape(s.shape, dtype), model.parameter_shapes(config))
    state = jax.eval_shape(lambda: empty_state(config.text, SLOTS, PAGES, dtype, max_pages=PAGES))
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)  # noqa: E731
    decode_state = jax.eval_shape(lambda: new_decode_state(zeros(), config.text.vocab_size))
    rows = [numbers((SLOTS,))] * 5
    batch = PrefillBatch(*rows, numbers((SLOTS, PAGES)), numbers((1, 2)), numbers((1,)))
    inputs = model.PrefillInput(numbers((TOKENS,)), numbers((TOKENS,)), batch)
    features = shape((64, config.text.hidden_size), dtype)
    channels = shape((PATCHES, config.vision.num_channels), jnp.float32)
    patches = shape((PATCHES, config.vision.patch_dim), jnp.uint8)
    views = packing.PackedViews(
        patches, channels, channels, numbers((PATCHES,)), numbers((VIEWS,)), numbers((VIEWS,)), PATCHES, "16x"
    )
    logits = shape((SLOTS, config.text.vocab_size), jnp.float32)
    allowed = shape((SLOTS, -(-config.text.vocab_size // 32)), jnp.uint32)
    first = FirstTokenInput(rows[0], decode_state.sampling, decode_state.stop_ids, *rows[:2])
    options = {"mode": "full", "backend": backend}
    decode_rows = functools.partial(decode, graph.text, steps=1, **options)
    return {
        "prefill": (functools.partial(model.prefill, graph.text), (params["text"], state, inputs, features)),
        "decode": (decode_rows, (params["text"], decode_state, rows[0], numbers((SLOTS, 2)))),
        "encode": (functools.partial(model.encode, graph.vision), (params["vision"], views)),
        "sample_first": (functools.partial(sample_first, **options), (decode_state, logits, first, allowed)),
        "sample_held": (functools.partial(sample_held, **options), (decode_state, rows[0], allowed)),
    }


def with_kernels(platform, backend):
    """Returns the names of the steps that contain a kernel when lowered for this platform's device."""
    mesh = jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=DEVICES[platform])
    found = set()
    with jax.sharding.use_abstract_mesh(mesh):
        for name, (step, arguments) in steps(backend).items():
            program = jax.jit(step).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
            if CUSTOM_CALLS[platform] in program:
                found.add(name)
    jax.clear_caches()  # traces of the described device, which other tests would take for their own
    return found


@pytest.mark.parametrize("platform", ["tpu", pytest.param("cuda", marks=needs_mosaic)])
def test_reference_backend_runs_no_kernel(platform):
    assert with_kernels(platform, "reference") == set()
    expected = {"prefill", "decode", "encode"} | (SAMPLING if platform == "cuda" else set())
    assert with_kernels(platform, None) == expected


class AllowAll:
    """A constraint that allows every token."""

    def __init__(self, vocabulary):
        self._mask = np.full(-(-vocabulary // 32), 0xFFFFFFFF, np.uint32)

    def mask(self):
        return self._mask

    def advance(self, token):
        pass


@pytest.fixture
def received(monkeypatch):
    """The backends that `sampling_threshold` was called with."""
    backends, threshold = [], sampling.sampling_threshold

    def record(*arguments, backend):
        backends.append(backend)
        return threshold(*arguments, backend=backend)

    monkeypatch.setattr(sampling, "sampling_threshold", record)
    return backends


def test_generator_passes_its_backend_to_sampling(demo, received):
    generator = Generator(demo.config, demo.params, "reference")
    constraint = AllowAll(demo.config.text.vocab_size)
    options = demo.options(max_new_tokens=2, temperature=1.0, top_p=0.5, seed=1, ignore_eos=True, constraint=constraint)
    list(generator.tokens(Inputs(np.arange(5, dtype=np.int32), ()), options))
    assert received == ["reference"] * 3  # traces of sample_first, decode and sample_held


def test_filter_scores_has_no_kernel_for_tpus(demo, received):
    params = jax.tree.map(jnp.asarray, sampling_params([demo.options(temperature=1.0, top_p=0.5)], [1]))
    scores = jnp.zeros((1, 8))
    np.testing.assert_array_equal(sampling.filter_scores(scores, params, backend="tpu"), scores)
    assert received == [None]
    with pytest.raises(ValueError, match="backend is 'warp'"):
        sampling.filter_scores(scores, params, backend="warp")
