"""manifest.json: the provenance and checksums of a converted folder.

{"format": "minicpmv46-jax", "version": 1, "source": ..., "revision": ..., "dtype": null or the dtype cast to,
 "jax": ..., "orbax": ..., "parameters": count, "files": {source file: sha256},
 "tensors": {dotted path: {"released": name, "dtype": ..., "shape": [...], "sha256": of the stored values}}}
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from minicpmv46_jax.checkpoint.names import ParamSpec
from minicpmv46_jax.config import read_json

FILE = "manifest.json"
FORMAT = "minicpmv46-jax"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A converted folder's source, and checksums of its source files and its tensors.

    Attributes:
      source: the folder or hub id that was converted.
      revision: the hub commit, or None for a folder.
      dtype: the dtype of the cast, or None if every tensor kept its dtype.
      jax, orbax: versions of the libraries.
      parameters: number of parameters.
      files: sha256 of each source file, by name.
      tensors: `tensor_record` of each tensor, by dotted path.
    """

    source: str
    revision: str | None
    dtype: str | None
    jax: str
    orbax: str
    parameters: int
    files: dict[str, str]
    tensors: dict[str, dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Writes manifest.json into `folder`."""
        raw = {"format": FORMAT, "version": VERSION} | dataclasses.asdict(self)
        (folder / FILE).write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads manifest.json from `folder`.

        Raises:
          ValueError: the manifest is missing or malformed, or has another format or version.
        """
        path = folder / FILE
        raw = read_json(path)
        if not is_manifest(raw):
            raise ValueError(f"{path}: field 'format' is not {FORMAT!r}")
        if raw.get("version") != VERSION:
            raise ValueError(f"{path}: format version is {raw.get('version')!r}, this code reads {VERSION}: convert again")
        fields = {field.name for field in dataclasses.fields(cls)}
        wrong = fields ^ (set(raw) - {"format", "version"})
        if wrong:
            raise ValueError(f"{path}: fields missing or unknown: {', '.join(sorted(wrong))}")
        for name in ("files", "tensors"):
            if not isinstance(raw[name], dict):
                raise ValueError(f"{path}: field {name!r} is a {type(raw[name]).__name__}, expected an object")
        return cls(**{name: raw[name] for name in fields})


def is_manifest(raw: Any) -> bool:
    """Returns whether parsed JSON is a converted folder's manifest, of any version."""
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def tensor_record(spec: ParamSpec, tensor: np.ndarray) -> dict[str, Any]:
    """Returns one tensor's record in the manifest."""
    return {"released": spec.hf_name, "dtype": tensor.dtype.name, "shape": list(tensor.shape), "sha256": tensor_sha256(tensor)}


def tensor_sha256(tensor: np.ndarray) -> str:
    """Returns the sha256 of the values' bytes in row-major order; both shapes of a tensor have the same."""
    return hashlib.sha256(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)).hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
