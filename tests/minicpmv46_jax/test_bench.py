"""The benchmark's counts of work; its times depend on the device."""

import functools

import jax
import pytest

from minicpmv46_jax import model
from minicpmv46_jax.bench import PHOTO_GRIDS, main, photo_inputs, tower_flops
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.model import packing
from tests.released import released_config


def test_tower_flops_equal_the_compilers_count():
    """The compiler's count includes padding and elementwise work, a few percent more."""
    config = ModelConfig.from_dict(released_config())
    ((_, packed),) = packing.pack(photo_inputs(config, 1).views, config.vision.positions_per_side)
    params = model.parameter_shapes(config)["vision"]
    encode = jax.jit(functools.partial(model.encode, model.schema(config).vision))
    counted = encode.lower(params, packed).cost_analysis()["flops"]
    ours = tower_flops(config.vision, config.text.hidden_size, PHOTO_GRIDS)
    assert ours < counted < 1.1 * ours


def test_photo_inputs_have_the_processors_grids(demo, photos):
    config = ModelConfig.from_dict(released_config())
    message = {"role": "user", "content": [{"type": "image", "image": photos[0].resize((1280, 720))}]}
    assert [view.grid for view in demo.process([message]).views] == PHOTO_GRIDS
    assert sum(view.num_tokens for view in photo_inputs(config, 5).views) == 444


def test_folder_without_config_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        main(["--model", str(tmp_path)])
