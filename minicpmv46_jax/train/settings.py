"""Settings of a run, parsed from TOML.

Parsing is strict: the error for an unknown name, a wrong type or a missing field names it.
"""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kernels_pallas.backends import ALIASES, HOPPER, REFERENCE, TPU
from minicpmv46_jax.train.batch import BatchShape
from minicpmv46_jax.train.data import ERRORS
from minicpmv46_jax.train.forward import REMAT
from minicpmv46_jax.train.lora import TARGETS
from minicpmv46_jax.train.optimizer import OptimizerConfig

BACKENDS = ("", REFERENCE, HOPPER, TPU, *ALIASES)  # "" selects the fastest that serves


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The `[model]` table.

    Attributes:
      source: folder or hub id of the model to start from.
      revision: the hub's branch, tag or commit.
    """

    source: str
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class DataSection:
    """The `[data]` table.

    Attributes:
      files: JSONL files; see `chat_formats`.
      media: folder that relative paths of pictures and videos start from; by default each file's own folder.
      errors: "fatal" ends the run at a row that cannot be trained on, "skip" leaves the row out.
      seed: seed of the shuffle; -1 for the files' order.
      epochs: number of passes over the data; 0 for no end.
      last_only: True to train on each conversation's last answer only.
      workers, threads: processes that parse rows, and threads in each; 0 processes for threads only.
      max_slice_nums, max_num_frames, stack_frames: as in `processing.Options`; 0 for the checkpoint's values.
    """

    files: tuple[str, ...]
    media: str | None = None
    errors: str = "fatal"
    seed: int = 0
    epochs: int = 0
    last_only: bool = False
    workers: int = 0
    threads: int = 4
    max_slice_nums: int = 0
    max_num_frames: int = 0
    stack_frames: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Options for `processing.Processor`."""
        chosen = {name: getattr(self, name) for name in ("max_slice_nums", "max_num_frames", "stack_frames")}
        return {name: value for name, value in chosen.items() if value}


@dataclasses.dataclass(frozen=True)
class LoraSection:
    """The `[lora]` table.

    Attributes:
      rank: the adapters' rank.
      alpha: an adapted matrix is W + alpha / rank b a.
      targets: regular expression for the dotted paths of adapted matrices.
      seed: seed of the matrices a.
    """

    rank: int
    alpha: float = 16.0
    targets: str = TARGETS
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """The `[mesh]` table.

    Attributes:
      data: number of replicas of the parameters.
      fsdp: number of shards of each replica.
    """

    data: int = 1
    fsdp: int = 1


@dataclasses.dataclass(frozen=True)
class RunSection:
    """The `[run]` table.

    Attributes:
      folder: folder of metrics and checkpoints; a run resumes from the newest checkpoint in it.
      steps: number of steps in all.
      save_every, log_every: steps between two checkpoints, and between two lines of metrics; the last step is
        always saved.
      keep: number of newest checkpoints that are kept.
      accumulation: number of batches whose gradients are summed in one step.
      dtype: the computing dtype, "bfloat16" or "float32".
      z_loss: weight of the squared log-sum-exp.
      remat, scan_layers: see `forward.batch_loss`.
      backend: backend of every operation of a step: "reference", "hopper" (alias "gpu"), "tpu", or "" for the
        fastest one that serves.
    """

    folder: str
    steps: int
    save_every: int = 500
    log_every: int = 10
    keep: int = 2
    accumulation: int = 1
    dtype: str = "bfloat16"
    z_loss: float = 0.0
    remat: str = "layer"
    scan_layers: bool = True
    backend: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run: the tables of its TOML file."""

    model: ModelSection
    data: DataSection
    batch: BatchShape
    run: RunSection
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshSection = dataclasses.field(default_factory=MeshSection)
    lora: LoraSection | None = None

    def __post_init__(self):
        for name in ("steps", "save_every", "log_every", "keep", "accumulation"):
            if getattr(self.run, name) < 1:
                raise ValueError(f"run.{name} is {getattr(self.run, name)}, expected 1 or more")
        _check_choice("run.dtype", self.run.dtype, ("bfloat16", "float32"))
        _check_choice("run.remat", self.run.remat, REMAT)
        _check_choice("run.backend", self.run.backend, BACKENDS)
        _check_choice("data.errors", self.data.errors, ERRORS)
        if self.lora is not None and self.lora.rank < 1:
            raise ValueError(f"lora.rank is {self.lora.rank}, expected 1 or more")

    @classmethod
    def from_toml(cls, path: str | Path) -> "Settings":
        """Reads a TOML file.

        Raises:
          ValueError: the file cannot be read or a field is invalid; the message names both.
        """
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, tables: dict[str, Any]) -> "Settings":
        """Builds settings from parsed TOML tables.

        Raises:
          ValueError: a field is invalid; the message names it.
        """
        hints = typing.get_type_hints(cls)
        _check_keys(tables, hints, "")
        missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in tables]
        if missing:
            raise ValueError(f"table [{missing[0]}] is missing")
        return cls(**{name: _parse_section(_unwrap_optional(hints[name]), table, name) for name, table in tables.items()})

    def to_dict(self) -> dict[str, Any]:
        """Returns the tables, as JSON can hold them."""
        tables = dataclasses.asdict(self)
        return {
            name: {key: value for key, value in table.items() if value is not None}
            for name, table in tables.items()
            if table is not None
        }


def _parse_section(kind: type, table: Any, name: str) -> Any:
    if not isinstance(table, dict):
        raise ValueError(f"{name} is {table!r}, expected a table")
    hints = typing.get_type_hints(kind)
    _check_keys(table, hints, f"{name}.")
    for field in dataclasses.fields(kind):
        if _required(field) and field.name not in table:
            raise ValueError(f"{name}.{field.name} is missing")
    return kind(**{key: _parse_value(_unwrap_optional(hints[key]), value, f"{name}.{key}") for key, value in table.items()})


def _parse_value(kind: Any, value: Any, name: str) -> Any:
    if kind == tuple[str, ...]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name} is {value!r}, expected a list of strings")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r}, expected {kind.__name__}")
    return value


def _check_keys(table: dict[str, Any], hints: dict[str, Any], prefix: str) -> None:
    for name in table:
        if name not in hints:
            raise ValueError(f"{prefix}{name} is unknown, expected {', '.join(hints)}")


def _check_choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _unwrap_optional(hint: Any) -> Any:
    """Returns X for the type hint `X | None`, and other hints unchanged."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return kinds[0] if isinstance(hint, types.UnionType) else hint
