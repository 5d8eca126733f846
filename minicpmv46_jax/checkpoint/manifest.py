"""manifest.json: what a converted folder says of itself.

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
    """Where a converted folder came from, and a fingerprint of all that went in and out."""

    source: str
    revision: str | None
    dtype: str | None
    jax: str
    orbax: str
    parameters: int
    files: dict[str, str]
    tensors: dict[str, dict[str, Any]]

    def write(self, folder: Path) -> None:
        raw = {"format": FORMAT, "version": VERSION} | dataclasses.asdict(self)
        (folder / FILE).write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises ValueError if the manifest is missing, of another format or version, or malformed."""
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
        return cls(**{name: raw[name] for name in fields})


def is_manifest(raw: Any) -> bool:
    """Whether parsed JSON is a manifest of ours, of whatever version."""
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def tensor_record(spec: ParamSpec, tensor: np.ndarray) -> dict[str, Any]:
    """One tensor's row of the manifest."""
    return {"released": spec.hf_name, "dtype": tensor.dtype.name, "shape": list(tensor.shape), "sha256": tensor_sha256(tensor)}


def tensor_sha256(tensor: np.ndarray) -> str:
    """Of the values' bytes in row-major order: the same for our shape and the released one."""
    return hashlib.sha256(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)).hexdigest()


def file_sha256(path: Path) -> str:
    """Of a file's bytes, read a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
