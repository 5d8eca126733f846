"""Parses a checkpoint's config.json and generation_config.json strictly.

A field that changes a number in the forward pass is required, unless transformers' own configuration class
has a default (`optional=True`). Unknown fields, missing fields and values that this code does not compute
raise errors that name them.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Fields for transformers, training or serving. They change no number in the forward pass.
IGNORED_FIELDS = frozenset(
    "_name_or_path architectures attention_dropout auto_map bos_token_id dtype eos_token_id id2label initializer_range label2id "
    "mtp_num_hidden_layers mtp_use_dedicated_embeddings output_attentions output_hidden_states pad_token_id problem_type "
    "return_dict torch_dtype transformers_version use_cache".split()
)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the text model; each is the field of the same name in config.json's `text_config`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rotary_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    linear_conv_kernel_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int

    @property
    def linear_key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def linear_conv_dim(self) -> int:
        """Channels of the causal convolution: q, k and v of every head."""
        return 2 * self.linear_key_dim + self.linear_value_dim


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower, from config.json's `vision_config` and its top level (`insert_layer_id`)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    patch_size: int
    image_size: int
    layer_norm_eps: float
    insert_layer_id: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_dim(self) -> int:
        """Number of values in a patch: channels x rows x columns."""
        return self.num_channels * self.patch_size**2

    @property
    def positions_per_side(self) -> int:
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Configuration of a whole MiniCPM-V 4.6 model, from config.json."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Reads `folder/config.json`. Raises ValueError that names the faulty field."""
        return cls.from_dict(read_json(Path(folder) / "config.json"))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Parses config.json's contents. Raises ValueError that names the faulty field."""
        fields = Fields(raw, "config.json")
        fields.require("model_type", "minicpmv4_6")
        fields.require("tie_word_embeddings", True)
        fields.require("drop_vision_last_layer", False, optional=True)
        fields.require("merge_kernel_size", [2, 2], optional=True)
        fields.require("merger_times", 1, optional=True)
        # The processor's settings decide downsample mode and sizes, and every view carries its own.
        fields.skip("downsample_mode", "image_size", "patch_size")
        config = cls(
            text=_text_config(fields.section("text_config")),
            vision=_vision_config(fields.section("vision_config"), fields.integer("insert_layer_id", minimum=0)),
            image_token_id=fields.integer("image_token_id", minimum=0),
            video_token_id=fields.integer("video_token_id", minimum=0),
        )
        fields.reject_unknown()
        return config


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Sampling defaults of a checkpoint (generation_config.json); a request may override each of them."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> "GenerationConfig":
        """Reads `folder/generation_config.json`.

        Without that file, the result is greedy decoding that stops at config.json's `eos_token_id`.
        Raises ValueError that names the faulty field.
        """
        folder = Path(folder)
        path = folder / "generation_config.json"
        if not path.exists():
            eos = read_json(folder / "config.json").get("eos_token_id")
            return cls(stop_token_ids=_token_ids(eos))
        fields = Fields(read_json(path), path.name)
        config = cls(
            do_sample=fields.value("do_sample", bool, default=False),
            temperature=fields.number("temperature", default=1.0),
            top_k=fields.integer("top_k", default=0, minimum=0),
            top_p=fields.number("top_p", default=1.0),
            min_p=fields.number("min_p", default=0.0),
            repetition_penalty=fields.number("repetition_penalty", default=1.0),
            stop_token_ids=_token_ids(fields.value("eos_token_id", (int, list), default=[])),
        )
        fields.skip("max_new_tokens", "max_length")  # the request sets the length
        fields.reject_unknown()
        return config


class Fields:
    """Strict reader of one JSON object: `reject_unknown` raises if a field was never read.

    Args:
      raw: the parsed object.
      where: the object's name in error messages.
    """

    def __init__(self, raw: Mapping[str, Any], where: str):
        if not isinstance(raw, Mapping):
            raise ValueError(f"{where}: expected an object, found {type(raw).__name__}")
        self.raw, self.where = raw, where
        self.remaining = set(raw) - IGNORED_FIELDS

    def value(self, name: str, kind: type | tuple, default: Any = None) -> Any:
        """Returns a field of type `kind`, or `default` if it is missing or null. Raises ValueError."""
        self.remaining.discard(name)
        found = self.raw.get(name)
        if found is None:
            if default is None:
                raise ValueError(f"{self.where}: field {name!r} is missing")
            return default
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{self.where}: field {name!r} is {found!r}, expected {names}")
        return found

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        """Returns an integer field of at least `minimum`. Raises ValueError."""
        found = self.value(name, int, default)
        if found < minimum:
            raise ValueError(f"{self.where}: field {name!r} is {found}, expected at least {minimum}")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a number field as a float. Raises ValueError."""
        return float(self.value(name, (int, float), default))

    def require(self, name: str, expected: Any, optional: bool = False) -> None:
        """Raises ValueError unless the field is `expected`, the only value that this code computes."""
        self.remaining.discard(name)
        if optional and self.raw.get(name) is None:
            return
        found = self.raw.get(name)
        if found != expected:
            raise ValueError(f"{self.where}: field {name!r} is {found!r}, but this code computes {expected!r} only")

    def skip(self, *names: str) -> None:
        """Marks fields as known without reading them."""
        self.remaining -= set(names)

    def section(self, name: str) -> "Fields":
        """Returns a reader of the object in a field."""
        return Fields(self.value(name, Mapping), f"{self.where}: {name}")

    def reject_unknown(self) -> None:
        """Raises ValueError for the first field that was neither read nor skipped."""
        if self.remaining:
            name = min(self.remaining)
            raise ValueError(f"{self.where}: field {name!r} = {self.raw[name]!r} is unknown to this code")


def read_json(path: Path) -> Any:
    """Parses a JSON file. Raises ValueError that names the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _text_config(fields: Fields) -> TextConfig:
    fields.require("model_type", "qwen3_5_text")
    fields.require("hidden_act", "silu")
    fields.require("attention_bias", False)
    fields.require("attn_output_gate", True, optional=True)
    fields.require("mamba_ssm_dtype", "float32", optional=True)
    fields.require("mlp_only_layers", [], optional=True)
    fields.require("tie_word_embeddings", True)
    head_dim = fields.integer("head_dim")
    rope_theta, rotary_dim = _rope(fields, head_dim)
    layers = fields.integer("num_hidden_layers")
    config = TextConfig(
        num_hidden_layers=layers,
        layer_types=_layer_types(fields, layers),
        head_dim=head_dim,
        rope_theta=rope_theta,
        rotary_dim=rotary_dim,
        rms_norm_eps=fields.number("rms_norm_eps"),
        **{name: fields.integer(name) for name in _TEXT_INTEGERS},
    )
    fields.reject_unknown()
    _check_multiple(fields, "num_attention_heads", "num_key_value_heads")
    _check_multiple(fields, "linear_num_value_heads", "linear_num_key_heads")
    return config


_TEXT_INTEGERS = (
    "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads max_position_embeddings "
    "linear_conv_kernel_dim linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim".split()
)


def _rope(fields: Fields, head_dim: int) -> tuple[float, int]:
    rope = fields.section("rope_parameters")
    rope.require("rope_type", "default")
    factor = rope.number("partial_rotary_factor")
    theta = rope.number("rope_theta")
    rope.skip("mrope_section", "mrope_interleaved")  # all three sections have the same positions here
    rope.reject_unknown()
    fields.require("partial_rotary_factor", factor, optional=True)
    return theta, int(head_dim * factor)


def _layer_types(fields: Fields, layers: int) -> tuple[str, ...]:
    types = tuple(fields.value("layer_types", list))
    fields.skip("full_attention_interval")  # layer_types has the same information
    if len(types) != layers:
        raise ValueError(f"{fields.where}: layer_types names {len(types)} layers, num_hidden_layers is {layers}")
    for kind in types:
        if kind not in ("linear_attention", "full_attention"):
            raise ValueError(f"{fields.where}: layer type {kind!r} is unknown, expected linear_attention or full_attention")
    return types


def _vision_config(fields: Fields, insert_layer_id: int) -> VisionConfig:
    fields.require("model_type", "minicpmv4_6_vision")
    fields.require("hidden_act", "gelu_pytorch_tanh")
    fields.require("insert_layer_id", insert_layer_id, optional=True)  # transformers uses the top level's value
    fields.require("window_kernel_size", [2, 2], optional=True)
    sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels patch_size image_size".split()
    config = VisionConfig(
        layer_norm_eps=fields.number("layer_norm_eps"),
        insert_layer_id=insert_layer_id,
        **{name: fields.integer(name) for name in sizes},
    )
    fields.reject_unknown()
    _check_multiple(fields, "hidden_size", "num_attention_heads")
    _check_multiple(fields, "image_size", "patch_size")
    if insert_layer_id >= config.num_hidden_layers:
        raise ValueError(
            f"config.json: insert_layer_id is {insert_layer_id}, but the tower has {config.num_hidden_layers} layers"
        )
    return config


def _check_multiple(fields: Fields, whole: str, part: str) -> None:
    if fields.raw[whole] % fields.raw[part]:
        raise ValueError(f"{fields.where}: {whole} {fields.raw[whole]} is not a multiple of {part} {fields.raw[part]}")


def _token_ids(raw: int | list | None) -> tuple[int, ...]:
    return () if raw is None else (raw,) if isinstance(raw, int) else tuple(raw)
