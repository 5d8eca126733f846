"""Writes a small, complete checkpoint in the released format: the release's structure with random weights.

Quirks:
- The tokenizer has one token per byte and no merges, so ids 0..255 are the bytes themselves. The added tokens
  of the release follow, with the same names and order.
- Norms and biases differ from ones and zeros, and matrices preserve the scale of their inputs, so a wrong
  formula changes the results.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from convert.demo.vocabulary import BYTES, SPLIT, TEMPLATE, Merge, bytes_to_unicode
from convert.export import export_hf
from minicpmv46_jax import model
from minicpmv46_jax.checkpoint import names
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.model import Params

SPECIAL = (  # hidden when text is decoded without special tokens
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
    "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <|audio_start|> <|audio_end|> "
    "<tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single> <|audio_pad|> <unk> <image> </image> <ref> </ref> <box> "
    "</box> <quad> </quad> <point> </point> <slice> </slice> <image_id> </image_id> <timestamp> </timestamp>"
).split()
VISIBLE = (  # one token each, but kept in decoded text, because parsers need them
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()
VISIBLE_FROM = SPECIAL.index("<|audio_start|>")  # their position in the release's order
ADDED = (*SPECIAL[:VISIBLE_FROM], *VISIBLE, *SPECIAL[VISIBLE_FROM:])


def added_ids(first: int) -> dict[str, int]:
    """Returns the ids of the added tokens, which follow the other tokens."""
    return {token: first + i for i, token in enumerate(ADDED)}


IDS = added_ids(BYTES)
ROLES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
VECTOR_SPREAD = 0.05  # deviation of norms and biases from `vector_mean`
EMBEDDING_SPREAD = 0.25  # gives logits a spread of about 2: no near-ties, and layers outweigh the token's own row


def write_demo_checkpoint(
    folder: str | Path, seed: int = 0, *, config: dict[str, Any] | None = None, dtype: DTypeLike = jnp.float32
) -> Path:
    """Writes the demo checkpoint; the same seed gives the same bytes.

    Args:
      folder: the folder to write; it must not exist, or be empty.
      seed: seed of the weights.
      config: config.json's contents, for variations of `demo_config()`.
      dtype: dtype of the weights.

    Returns:
      `folder`.

    Raises:
      ValueError: `folder` is not empty, or this code cannot compute `config`.
    """
    config = demo_config() if config is None else config
    params = demo_params(ModelConfig.from_dict(config), seed, dtype)
    with tempfile.TemporaryDirectory() as beside:
        write_files(Path(beside), side_files(config))
        return export_hf(params, beside, folder)


def write_files(folder: Path, files: dict[str, Any]) -> None:
    """Writes strings unchanged and other values as JSON."""
    for name, contents in files.items():
        text = contents if isinstance(contents, str) else json.dumps(contents, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def demo_params(config: ModelConfig, seed: int, dtype: DTypeLike) -> Params:
    """Returns random parameters of unit gain, drawn by numpy.

    They are the same on every version of jax, and need no compilation, unlike `model.init_params`.
    """
    random = np.random.default_rng(seed)

    def draw(keys: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(_values(random, names.tree_path(keys), leaf.shape).astype(dtype))

    return jax.tree_util.tree_map_with_path(draw, model.parameter_shapes(config))


def _values(random: np.random.Generator, path: names.TreePath, shape: names.Shape) -> np.ndarray:
    if path[-1] == "A_log":
        return np.log(random.uniform(0.01, 16.0, shape))  # the gated delta net's initialisation
    if len(shape) == 1:
        return vector_mean(path) + VECTOR_SPREAD * random.standard_normal(shape)
    spread = EMBEDDING_SPREAD if "embed" in str(path[-2]) and path[-2] != "patch_embed" else shape[-1] ** -0.5
    return spread * random.standard_normal(shape)


def vector_mean(path: names.TreePath) -> float:
    """Returns a vector's mean: 1 for `dt_bias` and norms, 0 for biases and the text's zero-centred norms."""
    if path[-1] == "dt_bias":
        return 1.0
    scales = path[0] == "vision" or path[-3:-1] == ("mixer", "norm")
    return 1.0 if path[-1] == "weight" and scales else 0.0


def demo_config() -> dict[str, Any]:
    """Returns config.json of the demo, a new dict: the release's fields with small sizes."""
    return {
        "architectures": ["MiniCPMV4_6ForConditionalGeneration"],
        "bos_token_id": None,
        "drop_vision_last_layer": False,
        "eos_token_id": IDS["<|endoftext|>"],
        "image_size": 1120,
        "image_token_id": IDS["<|image_pad|>"],
        "insert_layer_id": 1,
        "model_type": "minicpmv4_6",
        "pad_token_id": None,
        "text_config": _text_config(),
        "tie_word_embeddings": True,
        "transformers_version": "5.7.0",
        "use_cache": True,
        "video_token_id": IDS["<|video_pad|>"],
        "vision_config": _vision_config(),
    }


def _text_config() -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 16,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 8192,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": BYTES + len(ADDED),
    }


def _vision_config() -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 48,
        "image_size": 980,
        "intermediate_size": 96,
        "layer_norm_eps": 1e-06,
        "model_type": "minicpmv4_6_vision",
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": 4,
        "patch_size": 14,
    }


def side_files(config: dict[str, Any], merges: Sequence[Merge] = (), **preprocessing: Any) -> dict[str, Any]:
    """Returns a folder's side files by name.

    They are like the release's, with `config`'s sizes and a vocabulary of bytes and merges.

    Args:
      config: config.json's contents.
      merges: the tokenizer's merges.
      preprocessing: fields to set in preprocessor_config.json.
    """
    return {
        "config.json": config,
        "generation_config.json": _generation_config(added_ids(BYTES + len(merges))),
        "preprocessor_config.json": preprocessor_config() | preprocessing,
        "tokenizer.json": _tokenizer(merges),
        "tokenizer_config.json": _tokenizer_config(config),
        "chat_template.jinja": TEMPLATE.read_text(encoding="utf-8"),
    }


def _generation_config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "bos_token_id": ids["<|im_start|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|endoftext|>"], ids["<|im_end|>"]],
        "repetition_penalty": 1.0,
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
        "transformers_version": "5.7.0",
    }


def preprocessor_config() -> dict[str, Any]:
    """Returns preprocessor_config.json with the release's settings."""
    return {
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "MiniCPMV4_6ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_slice_nums": 9,
        "patch_size": 14,
        "processor_class": "MiniCPMV4_6Processor",
        "scale_resolution": 448,
        "slice_mode": True,
        "use_image_id": True,
    }


def _tokenizer(merges: Sequence[Merge]) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    ids = added_ids(BYTES + len(merges))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags, "special": token in SPECIAL} for token, i in ids.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate([*bytes_to_unicode(), *("".join(merge) for merge in merges)])},
            "merges": [list(merge) for merge in merges],
        },
    }


def _tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token": "<|im_start|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "extra_special_tokens": ROLES,
        "model_max_length": config["text_config"]["max_position_embeddings"],
        "pad_token": "<|endoftext|>",
        "processor_class": "MiniCPMV4_6Processor",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": "<unk>",
    }
