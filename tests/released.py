"""Sizes of the released checkpoint."""

from convert.demo.random_checkpoint import demo_config

TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "vocab_size": 248094,
    "max_position_embeddings": 262144,
}
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


def released_config() -> dict:
    """Returns config.json of the released sizes, with the demo's vocabulary ids."""
    config = demo_config()
    config["text_config"].update(TEXT)
    config["vision_config"].update(VISION)
    config["insert_layer_id"] = 6
    return config
