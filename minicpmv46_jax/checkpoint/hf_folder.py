"""Reads a released folder: checks its safetensors files against the model, then reads one tensor at a time.

Quirks:
- safetensors reads bfloat16 into numpy only after ml_dtypes has registered the type. Its import is enough.
- The `pread` backend (safetensors 0.8 and later) reads only the requested tensor. The default backend maps
  the whole file, and mapped pages count as used memory.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from minicpmv46_jax.checkpoint.names import EMBEDDING, LM_HEAD, ParamSpec, Shape
from minicpmv46_jax.config import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
COMPARE_ROWS = 8192  # rows of two embeddings compared at once; bounds memory to 16 MiB each in bfloat16


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in a safetensors header.

    Attributes:
      file: the safetensors file.
      dtype: numpy's name of the dtype, or safetensors' code if the dtype is not supported.
      shape: the tensor's shape in the file.
    """

    file: Path
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def weight_files(folder: Path) -> list[Path]:
    """Returns a released folder's safetensors files: the single file if it exists, else the index's shards.

    transformers has the same order.

    Raises:
      ValueError: there are no files, the index is malformed, or one of its shards is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(_missing_weights_message(folder))
    files = [folder / name for name in sorted(set(_weight_map(folder).values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder / INDEX} names shards that are missing: {', '.join(missing)}")
    return files


def read_tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """Reads the header entry of every tensor of a released folder, by name.

    Raises:
      ValueError: a file is missing, truncated or corrupt; index and shards disagree; two shards contain the
        same tensor.
    """
    files = weight_files(folder)
    found: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _read_header(file).items():
            if name in found:
                raise ValueError(f"tensor {name} is in two files: {found[name].file} and {file}")
            found[name] = info
    if files[0].name != WEIGHTS:
        _check_index(folder, found)
    return found


def check_tensors(folder: Path, found: dict[str, TensorInfo], wanted: Iterable[ParamSpec]) -> None:
    """Checks that a folder's tensors and the model's parameters match exactly.

    Raises:
      ValueError: lists every tensor that is missing or extra, or has another shape or an unsupported dtype.
    """
    shapes = {spec.hf_name: spec.hf_shape for spec in wanted}
    tied = {EMBEDDING: found[EMBEDDING], LM_HEAD: found[LM_HEAD]} if EMBEDDING in found and LM_HEAD in found else {}
    rest = {name: info for name, info in found.items() if not (tied and name == LM_HEAD)}
    mismatches = find_mismatches({name: (info.shape, info.dtype) for name, info in rest.items()}, shapes)
    if tied and not _have_same_bytes(tied[EMBEDDING], tied[LM_HEAD]):
        mismatches.append(f"untied: {LM_HEAD} differs from {EMBEDDING}, but config.json ties them")
    raise_mismatches(folder, mismatches)


def find_mismatches(found: dict[str, tuple[Shape, str]], wanted: dict[str, Shape]) -> list[str]:
    """Returns one line per mismatch of tensors found (shape and dtype by name) and wanted (shape by name)."""
    known = {dtype.name for dtype in DTYPES.values()}
    both = [name for name in wanted if name in found]
    return [
        *(f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in found),
        *(f"extra: {name} {list(found[name][0])}" for name in found if name not in wanted),
        *(
            f"shape: {name} is {list(found[name][0])}, expected {list(wanted[name])}"
            for name in both
            if found[name][0] != wanted[name]
        ),
        *(
            f"dtype: {name} is {found[name][1]}, expected bfloat16, float16 or float32"
            for name in both
            if found[name][1] not in known
        ),
    ]


def raise_mismatches(folder: Path, mismatches: list[str]) -> None:
    """Raises a ValueError that lists all `mismatches`, unless there are none."""
    if mismatches:
        raise ValueError(f"{folder} does not hold the model that its config.json describes:\n  " + "\n  ".join(mismatches))


def read_tensors(found: dict[str, TensorInfo], wanted: Iterable[ParamSpec]) -> Iterator[tuple[ParamSpec, np.ndarray]]:
    """Reads one tensor at a time, in our tree's shape and the file's dtype.

    Args:
      found: the folder's header entries, checked by `check_tensors`.
      wanted: the model's parameter specs.

    Raises:
      ValueError: a tensor cannot be read; the message names its file.
    """
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(_open(file)) for file in sorted({info.file for info in found.values()})}
        for spec in wanted:
            yield spec, _read_tensor(files, found[spec.hf_name].file, spec)


def _read_tensor(files: dict[Path, safe_open], file: Path, spec: ParamSpec) -> np.ndarray:
    try:
        return files[file].get_tensor(spec.hf_name).reshape(spec.shape)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: tensor {spec.hf_name} cannot be read: {error}") from None


def _missing_weights_message(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if not pickles:
        return f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX} is there (only safetensors are read)"
    return (
        f"{folder / pickles[0]} is a pickle file, and only safetensors are read: download a revision with {WEIGHTS}, "
        "or write one with transformers' save_pretrained"
    )


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    raw = read_json(path)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{path}: field 'weight_map' is not an object of file names")
    for name in weight_map.values():
        if Path(name).name != name:
            raise ValueError(f"{path}: shard {name!r} is not a plain file name")
    return weight_map


def _check_index(folder: Path, found: dict[str, TensorInfo]) -> None:
    weight_map = _weight_map(folder)
    for name, shard in weight_map.items():
        if name not in found or found[name].file.name != shard:
            raise ValueError(f"{folder / INDEX} puts tensor {name} into {shard}, which lacks it")
    for name, info in found.items():
        if name not in weight_map:
            raise ValueError(f"{info.file} holds tensor {name}, which {INDEX} does not name")


def _read_header(file: Path) -> dict[str, TensorInfo]:
    with _open(file) as reader:
        views = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 (safe_open is not iterable)
        return {name: _tensor_info(file, view.get_dtype(), view.get_shape()) for name, view in views.items()}


def _tensor_info(file: Path, code: str, shape: list[int]) -> TensorInfo:
    return TensorInfo(file, DTYPES[code].name if code in DTYPES else code, tuple(shape))


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="numpy", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from None


def _have_same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with _open(a.file) as file_a, _open(b.file) as file_b:
        rows_a, rows_b = file_a.get_slice(EMBEDDING), file_b.get_slice(LM_HEAD)
        ends = [min(start + COMPARE_ROWS, a.shape[0]) for start in range(0, a.shape[0], COMPARE_ROWS)]
        return all(
            rows_a[start:end].tobytes() == rows_b[start:end].tobytes() for start, end in zip([0, *ends], ends, strict=False)
        )
