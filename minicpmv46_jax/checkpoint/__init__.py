"""Finds a checkpoint and loads it into a plain tree of arrays.

    folder = resolve("openbmb/MiniCPM-V-4_6")  # or a folder
    params = load_params(folder, ModelConfig.from_folder(folder), dtype=jnp.bfloat16)

Two kinds of folder contain the same tensors: released folders (safetensors) and converted folders (Orbax).

Glossary:
  released folder: a folder in the format of the Hugging Face release.
  converted folder: the output of `python -m convert`: an Orbax checkpoint, the side files and a manifest.
  parameter spec: a row of the weight map: a parameter's path in our tree, its Hugging Face name, both shapes.
  side files: everything in a released folder but the weights: config, tokenizer, chat template, license.
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
from minicpmv46_jax.checkpoint import checksums, hf_folder, manifest
from minicpmv46_jax.checkpoint.names import ParamSpec, param_specs
from minicpmv46_jax.checkpoint.source import SIDE_FILES, resolve
from minicpmv46_jax.config import ModelConfig, read_json
from minicpmv46_jax.model import Params

__all__ = ["PARAMS", "SIDE_FILES", "ParamSpec", "is_converted", "load_params", "param_specs", "read_tensors", "resolve"]

PARAMS = "params"  # name of the Orbax checkpoint in a converted folder


def is_converted(folder: str | Path) -> bool:
    """Returns whether `python -m convert` wrote the folder, in any format version."""
    path = Path(folder) / manifest.FILE
    return path.is_file() and manifest.is_manifest(read_json(path))


def load_params(
    folder: str | Path,
    config: ModelConfig,
    dtype: DTypeLike | None = None,
    progress: bool = False,
    cancelled: threading.Event | None = None,
    verify_checksums: bool = True,
) -> Params:
    """Loads every parameter of a released or converted folder to jax's default device.

    Peak memory is about the parameters and one tensor (in a converted folder: one group of
    `orbax_folder.GROUP_BYTES`, and at most `checksums.MAX_PENDING_BYTES` that wait for their checksum).

    Args:
      folder: a released folder (model.safetensors, or shards and their index) or a converted folder.
      config: the model's sizes; `ModelConfig.from_folder(folder)`.
      dtype: float32, bfloat16 or float16 for every tensor; None keeps each tensor's dtype.
      progress: draw a progress bar if stderr is a terminal.
      cancelled: an event that cancels the load when it is set.
      verify_checksums: compare each tensor of a converted folder with the sha256 in its manifest. A released
        folder has no checksums, so nothing detects a changed value in it.

    Returns:
      A tree with the structure of `model.parameter_shapes(config)`.

    Raises:
      ValueError: files are missing or damaged, or contain another model than `config`; the message lists
        every mismatch.
      CancelledError: `cancelled` was set.
    """
    wanted = param_specs(config)
    tensors = read_tensors(Path(folder), wanted, dtype, verify_checksums)
    leaves = []
    for _, tensor in tqdm.tqdm(tensors, total=len(wanted), unit=" tensors", leave=False, disable=None if progress else True):
        if cancelled is not None and cancelled.is_set():
            raise CancelledError
        leaves.append(jnp.asarray(tensor))
    return jax.tree.unflatten(jax.tree.structure(model.parameter_shapes(config)), leaves)


def read_tensors(
    folder: Path, wanted: tuple[ParamSpec, ...], dtype: DTypeLike | None = None, verify_checksums: bool = True
) -> Iterator[tuple[ParamSpec, np.ndarray]]:
    """Checks a folder against `wanted` at once, then reads one tensor at a time, in the order of `wanted`.

    Args:
      folder: a released or converted folder.
      wanted: the model's parameter specs.
      dtype: float32, bfloat16 or float16 for every tensor; None keeps each tensor's dtype.
      verify_checksums: see `load_params`. A mismatch is raised at the latest after the last tensor.

    Raises:
      ValueError: see `load_params`.
    """
    if is_converted(folder):
        tensors = _converted_tensors(folder, wanted, verify_checksums)
    else:
        found = hf_folder.read_tensor_infos(folder)
        hf_folder.check_tensors(folder, found, wanted)
        tensors = hf_folder.read_tensors(found, wanted)
    return tensors if dtype is None else _cast(tensors, _check_dtype(dtype))


def _cast(tensors: Iterator[tuple[ParamSpec, np.ndarray]], dtype: np.dtype) -> Iterator[tuple[ParamSpec, np.ndarray]]:
    for spec, tensor in tensors:
        tensor = tensor.astype(dtype, copy=False)  # rebinding frees the original before the caller gets the cast one
        yield spec, tensor
        del tensor  # freed before the next tensor is read


def _converted_tensors(
    folder: Path, wanted: tuple[ParamSpec, ...], verify_checksums: bool
) -> Iterator[tuple[ParamSpec, np.ndarray]]:
    # Imported here, because Orbax takes a second to import and a released folder does not need it.
    from minicpmv46_jax.checkpoint import orbax_folder

    held = manifest.Manifest.read(folder)
    found = orbax_folder.read_metadata(folder / PARAMS)
    hf_folder.raise_mismatches(folder, hf_folder.find_mismatches(found, {spec.dotted: spec.shape for spec in wanted}))
    tensors = orbax_folder.read(folder / PARAMS, wanted, found)
    if not verify_checksums:
        return tensors
    checksums.check_vocabulary(folder, held.files)
    return checksums.verified(tensors, folder, held.tensors)


def _check_dtype(dtype: DTypeLike) -> np.dtype:
    found = jnp.dtype(dtype)
    if found not in hf_folder.DTYPES.values():
        raise ValueError(f"dtype is {found.name}, expected bfloat16, float16 or float32")
    return found
