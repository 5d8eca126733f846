"""Media settings of a checkpoint (`MediaConfig`) and media options of a request (`MediaOptions`).

The released checkpoint leaves out `downsample_mode`, `max_num_frames` and `stack_frames`. Their defaults are
those of transformers' classes (models/minicpmv4_6). The checkpoint's files must contain every other setting.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from minicpmv46_jax.short_repr import short_repr

DOWNSAMPLE_MODES = ("16x", "4x")
# Frames of one second are joined into one canvas, so an unlimited number would make an unlimited canvas. The
# reference has no limit; the released model was trained with up to 5.
MAX_STACK_FRAMES = 16
# Upper bounds of the other numbers, far above use: a photograph of 89 megapixels has 445 slices, and 65,536
# frames are 18 hours of video.
MAX_SLICE_NUMS = 4096
MAX_NUM_FRAMES = 65_536
_UPPER_BOUNDS = {"max_slice_nums": MAX_SLICE_NUMS, "max_num_frames": MAX_NUM_FRAMES, "stack_frames": MAX_STACK_FRAMES}


@dataclass(frozen=True)
class MediaOptions:
    """Media options of one request, or of one message.

    Attributes:
        max_slice_nums: most slices of an image, 1 to 4096; with 1, images are not sliced.
        use_image_id: write `<image_id>0</image_id>` before each image or video.
        downsample_mode: "16x" (a token per 16 patches) or "4x" (a token per 4).
        max_num_frames: most main frames sampled from a video, 1 to 65,536.
        stack_frames: frames sampled per second, 1 to 16; those after the first are joined into one composite
            image.
    """

    max_slice_nums: int
    use_image_id: bool
    downsample_mode: str = "16x"
    max_num_frames: int = 128
    stack_frames: int = 1

    def __post_init__(self) -> None:
        for name in OPTION_NAMES:
            check_option(name, getattr(self, name))

    @property
    def merge_factor(self) -> int:
        """Patches along one side of the square that becomes one token: 2 or 4."""
        return 2 if self.downsample_mode == "4x" else 4

    def with_overrides(self, overrides: Any, where: str) -> "MediaOptions":
        """Returns these options with the mapping `overrides` applied; an override of None has no effect.

        Raises:
            ValueError: a name is unknown, a type is wrong or a value is out of range; the message starts with
                `where`.
        """
        if not isinstance(overrides, Mapping):
            raise ValueError(f"{where}: expected a mapping of options, got {type(overrides).__name__}")
        if unknown := [name for name in overrides if name not in OPTION_NAMES]:
            raise ValueError(f"{where}: unknown option {short_repr(unknown[0])}; known are {', '.join(OPTION_NAMES)}")
        chosen = {name: value for name, value in overrides.items() if value is not None}
        for name, value in chosen.items():
            check_option(name, value, f"{where}: ")
        return replace(self, **chosen)


OPTION_NAMES = tuple(field.name for field in fields(MediaOptions))


def check_option(name: str, value: Any, prefix: str = "") -> None:
    """Raises ValueError if the option cannot have this value."""
    if name == "downsample_mode":
        if value not in DOWNSAMPLE_MODES:
            raise ValueError(f"{prefix}{name} must be one of {', '.join(DOWNSAMPLE_MODES)}, got {short_repr(value)}")
    elif name == "use_image_id":
        if not isinstance(value, bool):
            raise ValueError(f"{prefix}{name} must be True or False, got {short_repr(value)}")
    else:
        _check_int(prefix + name, value, 1, _UPPER_BOUNDS[name])


@dataclass(frozen=True)
class MediaConfig:
    """Settings of a checkpoint for its images, or for its videos.

    Attributes:
        patch_size: side of a patch in pixels.
        scale_resolution: a view has about scale_resolution**2 pixels.
        slice_mode: whether large images are sliced at all.
        image_mean, image_std: mean and deviation per channel, of values from 0 to 1.
        options: the default options, which a request may override.
        rescale_factor: factor from a byte to 0..1.
    """

    patch_size: int
    scale_resolution: int
    slice_mode: bool
    image_mean: tuple[float | int, float | int, float | int]
    image_std: tuple[float | int, float | int, float | int]
    options: MediaOptions
    rescale_factor: float | int = 1 / 255

    @classmethod
    def from_dict(cls, section: Any, where: str) -> "MediaConfig":
        """Parses one section of a checkpoint's preprocessor files.

        Raises:
            ValueError: a required field is missing, a field is unknown, or a field has a value that is not
                supported.
        """
        if not isinstance(section, Mapping):
            raise ValueError(f"{where}: expected a JSON object, got {type(section).__name__}")
        if missing := [name for name in _REQUIRED if section.get(name) is None]:
            raise ValueError(f"{where}: {missing[0]} is missing")
        for name, value in section.items():
            _check_field(name, value, where)
        _check_int(f"{where}: patch_size", section["patch_size"], 1)
        _check_int(f"{where}: scale_resolution", section["scale_resolution"], 1)
        if not isinstance(section["slice_mode"], bool):
            raise ValueError(f"{where}: slice_mode must be true or false, got {section['slice_mode']!r}")
        if 0 in (std := _three_numbers(section, "image_std", where)):
            raise ValueError(f"{where}: image_std must not be zero, got {std}")
        defaults = MediaOptions(max_slice_nums=1, use_image_id=True)
        return cls(
            patch_size=section["patch_size"],
            scale_resolution=section["scale_resolution"],
            slice_mode=section["slice_mode"],
            image_mean=_three_numbers(section, "image_mean", where),
            image_std=std,
            options=defaults.with_overrides({name: value for name, value in section.items() if name in OPTION_NAMES}, where),
            rescale_factor=_rescale_factor(section.get("rescale_factor"), where),
        )


_REQUIRED = ("patch_size", "scale_resolution", "slice_mode", "image_mean", "image_std", "max_slice_nums", "use_image_id")
_READ_FIELDS = {*_REQUIRED, *OPTION_NAMES, "rescale_factor"}
_LABELS = {"image_processor_type", "video_processor_type", "feature_extractor_type", "processor_class", "auto_map"}
# Fields that transformers writes; only this value, or null, is supported (3 is PIL's BICUBIC).
_FIXED_VALUES = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_sample_frames": True,
    "do_center_crop": False,
    "do_pad": False,
    "resample": 3,
    "default_to_square": True,
    "data_format": "channels_first",
    "return_metadata": False,
}
# Fields that must be null, because each would change the pixels.
_MUST_BE_NULL = {"size", "crop_size", "pad_size", "num_frames", "fps", "input_data_format", "video_metadata", "image_seq_length"}
_NO_EFFECT = {"device", "return_tensors", "disable_grouping"}


def _check_field(name: str, value: Any, where: str) -> None:
    if name in _READ_FIELDS or name in _LABELS or name in _NO_EFFECT:
        return
    if name in _FIXED_VALUES:
        if value is not None and value != _FIXED_VALUES[name]:
            raise ValueError(f"{where}: {name} = {value!r} is not supported, only {_FIXED_VALUES[name]!r}")
    elif name in _MUST_BE_NULL:
        if value is not None:
            raise ValueError(f"{where}: {name} = {value!r} is not supported, only null")
    else:
        raise ValueError(f"{where}: unknown field {name!r}")


def _check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    wanted = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {wanted}, got {short_repr(value)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _three_numbers(section: Mapping[str, Any], name: str, where: str) -> tuple[float | int, float | int, float | int]:
    """Parses one number for all channels, or a list of three, into one number per channel."""
    value = section[name]
    values = [value] * 3 if _is_number(value) else value
    if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
        raise ValueError(f"{where}: {name} must be a number or a list of three, got {value!r}")
    return tuple(values)


def _rescale_factor(value: Any, where: str) -> float | int:
    if value is None:
        return 1 / 255
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{where}: rescale_factor must be a number above 0, got {value!r}")
    return value


def read_configs(folder: Path) -> tuple[MediaConfig, MediaConfig]:
    """Reads the (image, video) settings of a checkpoint folder.

    The order of files is transformers' (video_processing_utils.py).

    Images: "image_processor" in processor_config.json, else preprocessor_config.json.
    Videos: "video_processor" in processor_config.json, else video_preprocessor_config.json, else
      preprocessor_config.json.

    Raises:
        ValueError: none of the files exists, or one is not a JSON object; errors of `MediaConfig.from_dict`.
    """
    nested = _read_json(folder / "processor_config.json") or {}
    images = _section(folder, nested, "image_processor", ["preprocessor_config.json"])
    videos = _section(folder, nested, "video_processor", ["video_preprocessor_config.json", "preprocessor_config.json"])
    # transformers' processor reads use_image_id from its image processor, for videos too.
    same_ids = replace(videos.options, use_image_id=images.options.use_image_id)
    return images, replace(videos, options=same_ids)


def _section(folder: Path, nested: Mapping[str, Any], name: str, files: list[str]) -> MediaConfig:
    if name in nested:
        return MediaConfig.from_dict(nested[name], f"{folder / 'processor_config.json'}: {name}")
    for file in files:
        if (section := _read_json(folder / file)) is not None:
            return MediaConfig.from_dict(section, str(folder / file))
    raise ValueError(f"{folder}: no {name} settings; looked for {', '.join(['processor_config.json', *files])}")


def _read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file, or None if the file does not exist."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
