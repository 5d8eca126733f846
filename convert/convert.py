"""Converts a released folder into a converted folder: an Orbax checkpoint, side files and a manifest."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint
import tqdm

from convert.folder import atomic_folder, copy_side_files
from minicpmv46_jax import checkpoint
from minicpmv46_jax.checkpoint import ParamSpec, hf_folder, manifest, orbax_folder
from minicpmv46_jax.config import ModelConfig


def convert(
    source: str | Path,
    out: str | Path | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> Path:
    """Converts a released checkpoint, one tensor at a time.

    Args:
      source: a released folder, or a hub id.
      out: the folder to write; None derives its name from `source`, in the working folder.
      dtype: "bfloat16" or "float32" casts every tensor; None keeps each tensor's dtype.
      revision: the hub branch, tag or commit of a hub id.
      progress: draw a progress bar if stderr is a terminal.

    Returns:
      `out`: params/ (Orbax), the side files and manifest.json. It is written completely or not at all.

    Raises:
      ValueError: the source is not found, is damaged, is another model or is converted already; `out` exists
        or is not writable; the disk is full.
    """
    folder = checkpoint.resolve(source, revision)
    if checkpoint.is_converted(folder):
        raise ValueError(f"{folder} is converted already")
    out = default_out(source, dtype) if out is None else Path(out)
    specs = checkpoint.param_specs(ModelConfig.from_folder(folder))
    tensors = checkpoint.read_tensors(folder, specs, dtype)
    records: dict[str, dict[str, Any]] = {}
    nbytes = _total_bytes(folder, dtype)
    with atomic_folder(out, nbytes) as partial:
        inputs = [*hf_folder.weight_files(folder), *copy_side_files(folder, partial, dtype)]
        with tqdm.tqdm(total=nbytes, unit="B", unit_scale=True, disable=None if progress else True) as bar:
            orbax_folder.write(partial / checkpoint.PARAMS, _record_tensors(tensors, records), bar.update)
        manifest.Manifest(
            source=str(source),
            revision=_commit(folder) if not Path(source).is_dir() else None,
            dtype=dtype,
            jax=jax.__version__,
            orbax=orbax.checkpoint.__version__,
            parameters=sum(int(np.prod(spec.shape)) for spec in specs),
            files={path.name: manifest.file_sha256(path) for path in inputs},
            tensors=records,
        ).write(partial)
    return out


def default_out(source: str | Path, dtype: str | None) -> Path:
    """Returns `NAME-jax`, or `NAME-jax-DTYPE`, in the working folder."""
    name = Path(source).resolve().name if Path(source).is_dir() else str(source).rsplit("/", 1)[-1]
    return Path(f"{name}-jax" if dtype is None else f"{name}-jax-{dtype}")


def _record_tensors(
    tensors: Iterator[tuple[ParamSpec, np.ndarray]], records: dict[str, dict[str, Any]]
) -> Iterator[tuple[ParamSpec, np.ndarray]]:
    """Yields the tensors unchanged and adds each one's manifest record to `records`."""
    for spec, tensor in tensors:
        records[spec.dotted] = manifest.tensor_record(spec, tensor)
        yield spec, tensor
        del tensor  # freed before the next tensor is read


def _total_bytes(folder: Path, dtype: str | None) -> int:
    infos = [info for name, info in hf_folder.read_tensor_infos(folder).items() if name != hf_folder.LM_HEAD]
    if dtype is None:
        return sum(info.nbytes for info in infos)
    return sum(int(np.prod(info.shape)) for info in infos) * np.dtype(dtype).itemsize


def _commit(folder: Path) -> str:
    """Returns the commit of a downloaded repository: huggingface_hub names its snapshot folders by commit."""
    return folder.name
