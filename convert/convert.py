"""Released folder in, converted folder out: the same tensors in one Orbax checkpoint, and the same files beside it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint
import tqdm

from convert.folder import building, copy_side_files
from minicpmv46_jax import checkpoint
from minicpmv46_jax.checkpoint import Slot, manifest
from minicpmv46_jax.checkpoint import hf_folder as released
from minicpmv46_jax.checkpoint import orbax_folder as store
from minicpmv46_jax.config import ModelConfig


def convert(
    source: str | Path,
    out: str | Path | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> Path:
    """Converts a released checkpoint, a tensor at a time.

    Args:
      source: a released folder, or a hub id.
      out: the folder to make; None derives its name from `source`, in the working folder.
      dtype: "bfloat16" or "float32" casts every tensor; None keeps each tensor's own.
      revision: of a hub id.
      progress: show a bar on stderr, where that is a terminal.

    Returns:
      `out`: params/ (Orbax), config.json and its companions, manifest.json. It appears whole or not at all.

    Raises:
      ValueError: the source cannot be found, is damaged, is another model or is converted already; `out` exists or cannot be
        written; the disk is full.
    """
    folder = checkpoint.resolve(source, revision)
    if checkpoint.is_converted(folder):
        raise ValueError(f"{folder} is converted already")
    out = default_out(source, dtype) if out is None else Path(out)
    slots = checkpoint.slots(ModelConfig.from_folder(folder))
    tensors = checkpoint.read_tensors(folder, slots, dtype)
    records: dict[str, dict[str, Any]] = {}
    nbytes = _total_bytes(folder, dtype)
    with building(out, nbytes) as partial:
        inputs = [*released.weight_files(folder), *copy_side_files(folder, partial, dtype)]
        with tqdm.tqdm(total=nbytes, unit="B", unit_scale=True, disable=None if progress else True) as bar:
            store.write(partial / checkpoint.PARAMS, _recorded(tensors, records), bar.update)
        manifest.Manifest(
            source=str(source),
            revision=_commit(folder) if not Path(source).is_dir() else None,
            dtype=dtype,
            jax=jax.__version__,
            orbax=orbax.checkpoint.__version__,
            parameters=sum(int(np.prod(slot.shape)) for slot in slots),
            files={path.name: manifest.file_sha256(path) for path in inputs},
            tensors=records,
        ).write(partial)
    return out


def default_out(source: str | Path, dtype: str | None) -> Path:
    """`NAME-jax`, or `NAME-jax-DTYPE`, in the working folder."""
    name = Path(source).resolve().name if Path(source).is_dir() else str(source).rsplit("/", 1)[-1]
    return Path(f"{name}-jax" if dtype is None else f"{name}-jax-{dtype}")


def _recorded(
    tensors: Iterator[tuple[Slot, np.ndarray]], records: dict[str, dict[str, Any]]
) -> Iterator[tuple[Slot, np.ndarray]]:
    """Passes the tensors on, and notes each for the manifest."""
    for slot, tensor in tensors:
        records[slot.dotted] = manifest.tensor_record(slot, tensor)
        yield slot, tensor
        del tensor  # one tensor at a time: drop this one before the next is read


def _total_bytes(folder: Path, dtype: str | None) -> int:
    entries = [entry for name, entry in released.entries(folder).items() if name != released.HEAD]
    if dtype is None:
        return sum(entry.nbytes for entry in entries)
    return sum(int(np.prod(entry.shape)) for entry in entries) * np.dtype(dtype).itemsize


def _commit(folder: Path) -> str:
    """The commit of a downloaded repository: huggingface_hub names its snapshot folders so."""
    return folder.name
