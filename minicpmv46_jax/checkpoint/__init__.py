"""Checkpoints: finding one, and reading it into a plain tree of arrays.

    folder = resolve("openbmb/MiniCPM-V-4_6")               # or a folder
    params = load_params(folder, ModelConfig.from_folder(folder), dtype=jnp.bfloat16)

Two kinds of folder hold the same tensors: a released one (safetensors) and a converted one (Orbax; see `convert`).
"""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.typing import DTypeLike

from minicpmv46_jax import model
from minicpmv46_jax.checkpoint import hf_folder, manifest
from minicpmv46_jax.checkpoint.names import ParamSpec, param_specs
from minicpmv46_jax.checkpoint.source import SIDE_FILES, resolve
from minicpmv46_jax.config import ModelConfig, read_json
from minicpmv46_jax.model import Params

__all__ = ["PARAMS", "SIDE_FILES", "ParamSpec", "is_converted", "load_params", "param_specs", "read_tensors", "resolve"]

PARAMS = "params"  # a converted folder's Orbax checkpoint


def is_converted(folder: str | Path) -> bool:
    """Whether `folder` is one that `python -m convert` wrote (of any format version)."""
    path = Path(folder) / manifest.FILE
    return path.is_file() and manifest.is_manifest(read_json(path))


def load_params(
    folder: str | Path,
    config: ModelConfig,
    dtype: DTypeLike | None = None,
    progress: bool = False,
    stopped: threading.Event | None = None,
) -> Params:
    """Every parameter of a released or converted folder, on jax's default device.

    Memory peaks at about the parameters and one tensor (of a converted folder: one group of `orbax_folder.GROUP_BYTES`).

    Args:
      folder: a released folder (model.safetensors, or shards and their index) or a converted one.
      config: what the model is; `ModelConfig.from_folder(folder)`.
      dtype: float32, bfloat16 or float16 for every tensor; None keeps each tensor's own.
      progress: draw a bar, on a terminal.
      stopped: if given, that nobody wants them any more.

    Returns:
      A tree shaped as `model.parameter_shapes(config)`.

    Raises:
      ValueError: the folder's files are missing or damaged, or hold another model than `config`; all disagreements are listed.
      CancelledError: it was `stopped`.
    """
    wanted = param_specs(config)
    tensors = read_tensors(Path(folder), wanted, dtype)
    leaves = []
    for _, tensor in tqdm.tqdm(tensors, total=len(wanted), unit=" tensors", leave=False, disable=None if progress else True):
        if stopped is not None and stopped.is_set():
            raise CancelledError
        leaves.append(jnp.asarray(tensor))
    return jax.tree.unflatten(jax.tree.structure(model.parameter_shapes(config)), leaves)


def read_tensors(
    folder: Path, wanted: tuple[ParamSpec, ...], dtype: DTypeLike | None = None
) -> Iterator[tuple[ParamSpec, np.ndarray]]:
    """Checks a released or converted folder against `wanted` at once, then reads one tensor at a time, in the order of `wanted`.

    Raises ValueError as `load_params` does.
    """
    if is_converted(folder):
        tensors = _converted_tensors(folder, wanted)
    else:
        found = hf_folder.read_tensor_infos(folder)
        hf_folder.check_tensors(folder, found, wanted)
        tensors = hf_folder.read_tensors(found, wanted)
    return tensors if dtype is None else _cast(tensors, _check_dtype(dtype))


def _cast(tensors: Iterator[tuple[ParamSpec, np.ndarray]], dtype: np.dtype) -> Iterator[tuple[ParamSpec, np.ndarray]]:
    for spec, tensor in tensors:
        tensor = tensor.astype(dtype, copy=False)  # rebinding drops the original before the caller takes over
        yield spec, tensor
        del tensor  # and this one before the next is read


def _converted_tensors(folder: Path, wanted: tuple[ParamSpec, ...]) -> Iterator[tuple[ParamSpec, np.ndarray]]:
    from minicpmv46_jax.checkpoint import (
        orbax_folder,  # Orbax takes a second to import, and a released folder needs none of it
    )

    manifest.Manifest.read(folder)
    found = orbax_folder.read_metadata(folder / PARAMS)
    hf_folder.raise_mismatches(folder, hf_folder.find_mismatches(found, {spec.dotted: spec.shape for spec in wanted}))
    return orbax_folder.read(folder / PARAMS, wanted, found)


def _check_dtype(dtype: DTypeLike) -> np.dtype:
    found = jnp.dtype(dtype)
    if found not in hf_folder.DTYPES.values():
        raise ValueError(f"dtype {found.name} was asked for, parameters are bfloat16, float16 or float32")
    return found
