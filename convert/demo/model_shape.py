"""The demo model's shape: a small member of the family that sees.

Sizes are chosen for sight: a letter of the scenes' print is two patches wide or so, a view of 224 x 224 is 16 x 16 patches and 64
tokens (16 in "16x"), and larger pictures are cut into slices. 5.9 million parameters, 11.8 MB in bfloat16.
"""

import copy
from collections.abc import Sequence
from typing import Any

from convert.demo.random_checkpoint import added_ids, demo_config, side_files
from convert.demo.vocabulary import BYTES, Merge

RESOLUTION = 224  # a view covers about its square
MAX_SLICES = 6
DOWNSAMPLE_MODE = "4x"  # unless a request says "16x": a token for 28 x 28 pixels, about a letter of the scenes' print
# Light grounds come out near 0. With the release's 0.5 all of a white patch is 1, so every step of Adam moves its 588 weights the
# same way: in 12,600 steps at 1.5e-3 embeddings grew from 1 to 19, beside positions of 0.3.
IMAGE_MEAN = [0.93, 0.93, 0.93]
POSITIONS_PER_SIDE = (
    24  # of the learned table, a side: the patches of a 224 x 224 view, and of a 336 x 168 one, have rows of their own
)
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
    """config.json of the demo model with a vocabulary of bytes, these merges and the added tokens."""
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
    """Every file of the folder but the weights."""
    views = {
        "scale_resolution": RESOLUTION,
        "max_slice_nums": MAX_SLICES,
        "image_mean": IMAGE_MEAN,
        "downsample_mode": DOWNSAMPLE_MODE,
    }
    files = side_files(model_config(merges), merges, **views)
    files["generation_config.json"] |= {"do_sample": False, "temperature": 1.0}  # its answers are right or wrong, not many
    return files
