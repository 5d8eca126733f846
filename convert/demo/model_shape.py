"""The demo model's shape: a small vision-language model of the same family, with 5.9 million parameters.

Sizes are chosen for reading: a letter of the scenes' print is about two patches wide. A view of 224 x 224
pixels has 16 x 16 patches and 64 tokens (16 in "16x"). Larger images are sliced.
"""

import copy
from collections.abc import Sequence
from typing import Any

from convert.demo.random_checkpoint import added_ids, demo_config, side_files
from convert.demo.vocabulary import BYTES, Merge

RESOLUTION = 224  # `scale_resolution`: a view has about RESOLUTION**2 pixels
MAX_SLICES = 6
DOWNSAMPLE_MODE = "4x"  # default of the demo model: a token for 28 x 28 pixels, about one letter of the scenes' print
# Light backgrounds become values near 0. With the release's mean of 0.5, all values of a white patch are 1,
# so each step of Adam moves all weights of the patch embedding the same way, and embeddings outgrow
# positions.
IMAGE_MEAN = [0.93, 0.93, 0.93]
# Side of the learned position table. Patches of a 224 x 224 view, and of a 336 x 168 view, have their own
# rows in it.
POSITIONS_PER_SIDE = 24
TEXT = {
    "full_attention_interval": 2,
    "head_dim": 32,
    "hidden_size": 192,
    "intermediate_size": 384,
    "layer_types": ["linear_attention", "full_attention"] * 3,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 32,
    "num_attention_heads": 6,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000, "rope_type": "default"},
}
VISION = {
    "hidden_size": 192,
    "image_size": POSITIONS_PER_SIDE * 14,
    "intermediate_size": 256,
    "num_attention_heads": 6,
    "num_hidden_layers": 6,
}


def model_config(merges: Sequence[Merge]) -> dict[str, Any]:
    """Returns the demo model's config.json, for a vocabulary of bytes, `merges` and the added tokens."""
    config, ids = copy.deepcopy(demo_config()), added_ids(BYTES + len(merges))
    config |= {
        "insert_layer_id": 2,
        "image_size": RESOLUTION,
        "eos_token_id": ids["<|endoftext|>"],
        "downsample_mode": DOWNSAMPLE_MODE,
    }
    config |= {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
    config["text_config"] |= {**TEXT, "vocab_size": BYTES + len(merges) + len(ids)}
    config["vision_config"] |= VISION
    return config


def model_files(merges: Sequence[Merge]) -> dict[str, Any]:
    """Returns the contents of every file of the model folder but the weights, by name."""
    views = {
        "scale_resolution": RESOLUTION,
        "max_slice_nums": MAX_SLICES,
        "image_mean": IMAGE_MEAN,
        "downsample_mode": DOWNSAMPLE_MODE,
    }
    files = side_files(model_config(merges), merges, **views)
    files["generation_config.json"] |= {"do_sample": False, "temperature": 1.0}  # its questions have one correct answer
    return files
