"""Exports parameters to a folder in the released format, which transformers loads.

Quirks:
- A tensor whose dtype is unchanged has the same bytes as in the source.
- The whole model is in memory once, because safetensors writes all tensors of a file in one call. It makes no
  copy.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from convert.folder import atomic_folder, copy_side_files
from minicpmv46_jax import checkpoint
from minicpmv46_jax.checkpoint import ParamSpec, hf_folder, manifest, names
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.model import Params


def export_hf(params: Params, config_folder: str | Path, out: str | Path) -> Path:
    """Writes parameters in memory as a released folder.

    Args:
      params: a tree from `load_params` or from training; each tensor keeps its dtype (float32, bfloat16 or
        float16).
      config_folder: a released or converted folder whose config.json describes `params`; its side files are
        copied.
      out: the folder to write; it is written completely or not at all.

    Returns:
      `out`.

    Raises:
      ValueError: `params` is not the model of that config.json (the message lists every mismatch); see
        `atomic_folder`.
    """
    config_folder = Path(config_folder)
    specs = checkpoint.param_specs(ModelConfig.from_folder(config_folder))
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves_by_name = {".".join(map(str, names.tree_path(keys))): leaf for keys, leaf in leaves}
    found = {name: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for name, leaf in leaves_by_name.items()}
    mismatches = hf_folder.find_mismatches(found, {spec.dotted: spec.shape for spec in specs})
    if mismatches:
        raise ValueError(f"params are not the model of {config_folder / 'config.json'}:\n  " + "\n  ".join(mismatches))
    return _write({spec: np.asarray(leaves_by_name[spec.dotted]) for spec in specs}, config_folder, Path(out))


def export_converted(folder: str | Path, out: str | Path) -> Path:
    """Writes a converted folder as a released folder; the inverse of `convert`.

    Raises:
      ValueError: `folder` is not a converted folder, or a tensor does not match its manifest record; see
        `atomic_folder`.
    """
    folder = Path(folder)
    if not checkpoint.is_converted(folder):
        raise ValueError(f"{folder} is not a converted folder: it has no {manifest.FILE} from `convert`")
    specs = checkpoint.param_specs(ModelConfig.from_folder(folder))
    return _write(dict(checkpoint.read_tensors(folder, specs)), folder, Path(out))


def export_run(folder: str | Path, out: str | Path) -> Path:
    """Writes a training run's model as a released folder, with adapters merged, in the source's dtypes.

    Raises:
      ValueError: the run has no checkpoint yet, or a checkpoint with other settings; see `atomic_folder`.
    """
    from minicpmv46_jax.train.run import trained_params  # training's dependencies are optional (an extra)

    params, source = trained_params(folder)
    return export_hf(params, source, out)


def _write(tensors: dict[ParamSpec, np.ndarray], config_folder: Path, out: Path) -> Path:
    dtypes = {tensor.dtype.name for tensor in tensors.values()}
    with atomic_folder(out, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        copy_side_files(config_folder, partial, dtypes.pop() if len(dtypes) == 1 else None)
        weights = {spec.hf_name: np.ascontiguousarray(tensor.reshape(spec.hf_shape)) for spec, tensor in tensors.items()}
        safetensors.numpy.save_file(weights, partial / hf_folder.WEIGHTS, metadata={"format": "pt"})
        # safetensors makes files that only their owner may read.
        shutil.copymode(partial / "config.json", partial / hf_folder.WEIGHTS)
    return out
