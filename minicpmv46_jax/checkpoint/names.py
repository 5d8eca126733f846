"""The weight map, as data: which released tensor is which parameter of ours.

Quirk: nothing is transposed or joined. A tensor keeps its bytes in both directions; two of them only drop or regain axes (the
causal convolution's middle 1, and the patch embedding's channel, row and column).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from minicpmv46_jax import model
from minicpmv46_jax.config import ModelConfig

TreePath = tuple[str | int, ...]
Shape = tuple[int, ...]

EMBEDDING = "model.language_model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"  # tied to the embedding: checkpoints leave it out, some writers repeat it

# Ours -> released, a module or a lone parameter a row; `#` is a layer's number. A module's `weight` and `bias` keep their names.
_TEXT_LAYERS = ("text.layers.#", "model.language_model.layers.#")
_VISION_LAYERS = ("vision.layers.#", "model.vision_tower.encoder.layers.#")
_WINDOW_MERGER = ("vision.window_merger", "model.vision_tower.vit_merger")
_MERGER = ("vision.merger", "model.merger.mlp.0")


def _map_names(
    prefixes: tuple[str, str], renamed: dict[str, str], group: tuple[str, str] = ("", ""), kept: str = ""
) -> dict[str, str]:
    """Rows under two prefixes: those renamed, and those whose name `kept` is the same inside `group`."""
    names = renamed | {group[0] + name: group[1] + name for name in kept.split()}
    return {f"{prefixes[0]}.{ours}": f"{prefixes[1]}.{released}" for ours, released in names.items()}


WEIGHT_MAP: dict[str, str] = {
    "text.embed": "model.language_model.embed_tokens",
    "text.norm": "model.language_model.norm",
    "vision.patch_embed": "model.vision_tower.embeddings.patch_embedding",
    "vision.position_embed": "model.vision_tower.embeddings.position_embedding",
    "vision.post_norm": "model.vision_tower.post_layernorm",
    **_map_names(_TEXT_LAYERS, {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}),
    **_map_names(_TEXT_LAYERS, {}, ("mlp.", "mlp."), "gate_proj up_proj down_proj"),
    **_map_names(_TEXT_LAYERS, {}, ("mixer.", "self_attn."), "q_proj k_proj v_proj o_proj q_norm k_norm"),
    **_map_names(
        _TEXT_LAYERS,
        {"mixer.conv": "linear_attn.conv1d.weight"},
        ("mixer.", "linear_attn."),
        "in_proj_qkv in_proj_z in_proj_b in_proj_a dt_bias A_log norm out_proj",
    ),
    **_map_names(
        _VISION_LAYERS, {"norm1": "layer_norm1", "norm2": "layer_norm2"}, ("attn.", "self_attn."), "q_proj k_proj v_proj out_proj"
    ),
    **_map_names(_VISION_LAYERS, {}, ("mlp.", "mlp."), "fc1 fc2"),
    **_map_names(_WINDOW_MERGER, {"norm1": "layer_norm1"}, ("attn.", "self_attn."), "q_proj k_proj v_proj out_proj"),
    **_map_names(_WINDOW_MERGER, {}, kept="pre_norm linear_1 linear_2"),
    **_map_names(_MERGER, {}, kept="pre_norm linear_1 linear_2"),
}


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: where it sits in our tree, what the release calls it, and its shape on either side."""

    path: TreePath
    hf_name: str
    shape: Shape
    hf_shape: Shape

    @property
    def dotted(self) -> str:
        """The path as one word: `text.layers.0.mlp.up_proj.weight`."""
        return ".".join(map(str, self.path))


def param_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Every parameter of the model, in the order of `jax.tree.leaves` over a tree of them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model.parameter_shapes(config))
    return tuple(_param_spec(tree_path(keys), leaf.shape, config) for keys, leaf in leaves)


def tree_path(keys: Sequence[Any]) -> TreePath:
    """jax's key path, as plain dict keys and list positions."""
    return tuple(key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key for key in keys)


def hf_name(path: TreePath) -> str:
    """What the release calls the parameter at `path`. Raises KeyError for a path that the map lacks."""
    numbers = [str(part) for part in path if isinstance(part, int)]
    parts = ["#" if isinstance(part, int) else part for part in path]
    whole, module = ".".join(parts), ".".join(parts[:-1])
    pattern = WEIGHT_MAP[whole] if whole in WEIGHT_MAP else f"{WEIGHT_MAP[module]}.{parts[-1]}"
    for number in numbers:
        pattern = pattern.replace("#", number, 1)
    return pattern


def _param_spec(path: TreePath, shape: Shape, config: ModelConfig) -> ParamSpec:
    return ParamSpec(path, hf_name(path), tuple(shape), _hf_shape(path, tuple(shape), config))


def _hf_shape(path: TreePath, shape: Shape, config: ModelConfig) -> Shape:
    if path[-1] == "conv":
        channels, kernel = shape
        return (channels, 1, kernel)  # torch's Conv1d: a depthwise filter has one input channel
    if path == ("vision", "patch_embed", "weight"):
        vision = config.vision
        return (shape[0], vision.num_channels, vision.patch_size, vision.patch_size)
    return shape
