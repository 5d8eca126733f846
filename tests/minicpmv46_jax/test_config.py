"""config.json is parsed strictly: each error names the faulty field."""

import copy
import json

import pytest

from convert.demo.random_checkpoint import demo_config
from minicpmv46_jax.config import GenerationConfig, ModelConfig


def changed(path, value):
    config = copy.deepcopy(demo_config())
    *parents, name = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    if value is KeyError:
        del section[name]
    else:
        section[name] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "llava", "'model_type' is 'llava', but this code computes 'minicpmv4_6' only"),
        ("model_type", KeyError, "'model_type' is None"),
        ("tie_word_embeddings", False, "'tie_word_embeddings' is False"),
        ("image_token_id", KeyError, "'image_token_id' is missing"),
        ("insert_layer_id", 99, "insert_layer_id is 99, but the tower has 4 layers"),
        ("merger_times", 2, "'merger_times' is 2"),
        ("warp_factor", 9, "field 'warp_factor' = 9 is unknown"),
        ("text_config", [], "'text_config' is []"),
        ("text_config.hidden_size", KeyError, "text_config: field 'hidden_size' is missing"),
        ("text_config.hidden_size", "64", "'hidden_size' is '64', expected int"),
        ("text_config.hidden_size", 0, "'hidden_size' is 0, expected at least 1"),
        ("text_config.rope_parameters.rope_theta", KeyError, "rope_parameters: field 'rope_theta' is missing"),
        ("text_config.rope_parameters.rope_type", "yarn", "'rope_type' is 'yarn', but this code computes 'default' only"),
        ("text_config.attention_bias", True, "'attention_bias' is True"),
        ("text_config.sliding_window", 5, "field 'sliding_window' = 5 is unknown"),
        ("text_config.layer_types", ["mamba"] * 4, "layer type 'mamba' is unknown"),
        ("text_config.layer_types", [], "layer_types names 0 layers, num_hidden_layers is 4"),
        ("text_config.num_key_value_heads", 3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("vision_config.hidden_act", "relu", "vision_config: field 'hidden_act' is 'relu'"),
        ("vision_config.layer_norm_eps", True, "'layer_norm_eps' is True"),
        ("vision_config.num_attention_heads", 5, "hidden_size 48 is not a multiple of num_attention_heads 5"),
    ],
)
def test_errors_name_the_field(path, value, message):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_dict(changed(path, value))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_config_json(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        ModelConfig.from_folder(tmp_path)


def test_malformed_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_folder(tmp_path)


def test_generation_config(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.7, "eos_token_id": [3, 4], "bos_token_id": 1}))
    config = GenerationConfig.from_folder(tmp_path)
    assert (config.do_sample, config.temperature, config.stop_token_ids) == (True, 0.7, (3, 4))
    path.write_text(json.dumps({"num_beams": 4}))
    with pytest.raises(ValueError, match="'num_beams' = 4 is unknown"):
        GenerationConfig.from_folder(tmp_path)


def test_stop_tokens_without_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert GenerationConfig.from_folder(tmp_path) == GenerationConfig(stop_token_ids=(9,))
