"""The weight map as data: the Hugging Face tensor of each parameter in our tree.

No tensor is transposed or joined, so every tensor keeps its bytes in both directions. Two tensors have
another
shape in our tree: the causal convolution drops its middle axis of 1, and the patch embedding joins its
channel, row and column axes.
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
LM_HEAD = "lm_head.weight"  # tied to the embedding; most checkpoints leave it out, some repeat it

# Prefixes of (our path, Hugging Face name); `#` stands for a layer's number.
_TEXT_LAYERS = ("text.layers.#", "model.language_model.layers.#")
_VISION_LAYERS = ("vision.layers.#", "model.vision_tower.encoder.layers.#")
_WINDOW_MERGER = ("vision.window_merger", "model.vision_tower.vit_merger")
_MERGER = ("vision.merger", "model.merger.mlp.0")


def _map_names(
    prefixes: tuple[str, str], renamed: dict[str, str], group: tuple[str, str] = ("", ""), kept: str = ""
) -> dict[str, str]:
    """Returns map entries under two prefixes.

    Args:
      prefixes: (our prefix, Hugging Face prefix).
      renamed: our name -> Hugging Face name.
      group: (our prefix, Hugging Face prefix) of the names in `kept`.
      kept: names that are the same on both sides.
    """
    names = renamed | {group[0] + name: group[1] + name for name in kept.split()}
    return {f"{prefixes[0]}.{ours}": f"{prefixes[1]}.{released}" for ours, released in names.items()}


# Our path -> Hugging Face name, of a module or of a single parameter. A module's `weight` and `bias` keep
# their names.
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
    """One parameter of the model.

    Attributes:
      path: its path in our tree.
      hf_name: its name in the Hugging Face release.
      shape: its shape in our tree.
      hf_shape: its shape in the Hugging Face release.
    """

    path: TreePath
    hf_name: str
    shape: Shape
    hf_shape: Shape

    @property
    def dotted(self) -> str:
        """The path joined by dots, such as `text.layers.0.mlp.up_proj.weight`."""
        return ".".join(map(str, self.path))


def param_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Returns the specs of all parameters, in the order of `jax.tree.leaves` of a parameter tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model.parameter_shapes(config))
    return tuple(_param_spec(tree_path(keys), leaf.shape, config) for keys, leaf in leaves)


def tree_path(keys: Sequence[Any]) -> TreePath:
    """Converts jax's key path into plain dict keys and list positions."""
    return tuple(key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key for key in keys)


def hf_name(path: TreePath) -> str:
    """Returns the Hugging Face name of the parameter at `path`. Raises KeyError for an unknown path."""
    numbers = [str(part) for part in path if isinstance(part, int)]
    parts = ["#" if isinstance(part, int) else part for part in path]
    parameter, module = ".".join(parts), ".".join(parts[:-1])
    pattern = WEIGHT_MAP[parameter] if parameter in WEIGHT_MAP else f"{WEIGHT_MAP[module]}.{parts[-1]}"
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
