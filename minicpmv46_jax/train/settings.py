"""What a run's TOML file says, read strictly: an unknown name, a wrong type or a missing field is refused by name."""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minicpmv46_jax.train.batch import BatchShape
from minicpmv46_jax.train.data import ERRORS
from minicpmv46_jax.train.forward import REMAT
from minicpmv46_jax.train.lora import TARGETS
from minicpmv46_jax.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """`[model]`. Attributes: source: a folder or hub id to begin from; revision: of the hub's."""

    source: str
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class DataSection:
    """`[data]`.

    Attributes:
      files: JSONL; see `rows`.
      media: what relative paths of pictures and videos are relative to; by default each file's own folder.
      errors: "fatal" or "skip": what becomes of rows that cannot be learned from.
      seed: of the shuffle; -1 for the files' order.
      epochs: how often the data is read; 0 without end.
      last_only: learn each conversation's last answer alone.
      workers, threads: processes, and threads in each, that read rows; 0 processes for threads alone.
      max_slice_nums, max_num_frames, stack_frames: as in `processing.Options`; 0 takes what the checkpoint says.
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
        """Those for `processing.Processor`."""
        chosen = {name: getattr(self, name) for name in ("max_slice_nums", "max_num_frames", "stack_frames")}
        return {name: value for name, value in chosen.items() if value}


@dataclasses.dataclass(frozen=True)
class LoraSection:
    """`[lora]`. Attributes: rank; alpha: the sum is W + alpha / rank b a; targets: an expression for dotted names; seed: of a."""

    rank: int
    alpha: float = 16.0
    targets: str = TARGETS
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """`[mesh]`. Attributes: data: devices that repeat the parameters; fsdp: devices that hold shards of them."""

    data: int = 1
    fsdp: int = 1


@dataclasses.dataclass(frozen=True)
class RunSection:
    """`[run]`.

    Attributes:
      folder: where metrics and checkpoints go; a run that finds checkpoints there goes on from the newest.
      steps: of the optimiser, in all.
      save_every, log_every: steps; a checkpoint is written at the end too.
      keep: how many of the newest checkpoints stay.
      accumulation: batches whose gradients make one step.
      dtype: to compute in, "bfloat16" or "float32".
      z_loss: weight of the squared log-sum-exp.
      remat, scan_layers: see `forward.loss`.
      backend: who runs the operations of `kernels_pallas`: "reference", "hopper", or "" for the fastest that serves.
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
    """A run."""

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
        _one_of("run.dtype", self.run.dtype, ("bfloat16", "float32"))
        _one_of("run.remat", self.run.remat, REMAT)
        _one_of("run.backend", self.run.backend, ("", "reference", "hopper", "gpu"))
        _one_of("data.errors", self.data.errors, ERRORS)
        if self.lora is not None and self.lora.rank < 1:
            raise ValueError(f"lora.rank is {self.lora.rank}, expected 1 or more")

    @classmethod
    def from_toml(cls, path: str | Path) -> "Settings":
        """Reads a file. Raises ValueError naming the file and the field at fault."""
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, tables: dict[str, Any]) -> "Settings":
        """Reads TOML's tables. Raises ValueError naming the field at fault."""
        hints = typing.get_type_hints(cls)
        _known(tables, hints, "")
        missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in tables]
        if missing:
            raise ValueError(f"table [{missing[0]}] is missing")
        return cls(**{name: _section(_bare(hints[name]), table, name) for name, table in tables.items()})

    def to_dict(self) -> dict[str, Any]:
        """The tables again, for JSON."""
        found = dataclasses.asdict(self)
        return {
            name: {key: value for key, value in table.items() if value is not None}
            for name, table in found.items()
            if table is not None
        }


def _section(kind: type, table: Any, name: str) -> Any:
    if not isinstance(table, dict):
        raise ValueError(f"{name} is {table!r}, expected a table")
    hints = typing.get_type_hints(kind)
    _known(table, hints, f"{name}.")
    for field in dataclasses.fields(kind):
        if _required(field) and field.name not in table:
            raise ValueError(f"{name}.{field.name} is missing")
    return kind(**{key: _value(_bare(hints[key]), value, f"{name}.{key}") for key, value in table.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    if kind == tuple[str, ...]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name} is {value!r}, expected a list of strings")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r}, expected {kind.__name__}")
    return value


def _known(table: dict[str, Any], hints: dict[str, Any], prefix: str) -> None:
    for name in table:
        if name not in hints:
            raise ValueError(f"{prefix}{name} is unknown, expected {', '.join(hints)}")


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _bare(hint: Any) -> Any:
    """`X | None` -> X."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return kinds[0] if isinstance(hint, types.UnionType) else hint
