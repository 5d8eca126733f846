"""Verifies a converted folder against the checksums in its manifest while its tensors are loaded."""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from minicpmv46_jax.checkpoint import manifest
from minicpmv46_jax.checkpoint.names import ParamSpec

THREADS = min(8, os.cpu_count() or 1)  # hashlib releases the GIL
MAX_PENDING_BYTES = 2**30  # of tensors that were loaded and are not hashed yet
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt")  # the other side files are settings, which may be edited
SHOWN_DIGITS = 12
ADVICE = "the file is damaged or was changed: convert again (--skip-checksums, or verify_checksums=False, loads it as it is)"


def check_vocabulary(folder: Path, recorded: Mapping[str, str]) -> None:
    """Checks the tokenizer's files, which a converted folder keeps byte for byte.

    Args:
      folder: a converted folder.
      recorded: sha256 of each source file, from the manifest.

    Raises:
      ValueError: a file differs from the manifest; the message has its path and both digests.
    """
    for name in VOCABULARY_FILES:
        if name in recorded and (folder / name).is_file():
            _check(str(folder / name), "sha256", manifest.file_sha256(folder / name), recorded[name])


def verified(
    tensors: Iterator[tuple[ParamSpec, np.ndarray]], folder: Path, records: Mapping[str, dict[str, Any]]
) -> Iterator[tuple[ParamSpec, np.ndarray]]:
    """Yields the tensors unchanged and hashes them in threads; the iteration ends only after the last check.

    Args:
      tensors: each parameter spec with its values.
      folder: the converted folder, for messages.
      records: `manifest.tensor_record` of each tensor, from the manifest.

    Raises:
      ValueError: a tensor differs from its record; the message has its name and both digests.
    """
    pending: deque[tuple[ParamSpec, int, Future[dict[str, Any]]]] = deque()
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="checksums")
    try:
        for spec, tensor in tensors:
            pending.append((spec, tensor.nbytes, pool.submit(manifest.tensor_record, spec, tensor)))
            yield spec, tensor
            del tensor  # the pending hash keeps it until it is done
            while pending and (pending[0][2].done() or sum(nbytes for _, nbytes, _ in pending) > MAX_PENDING_BYTES):
                _check_tensor(folder, pending.popleft(), records)
        while pending:
            _check_tensor(folder, pending.popleft(), records)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _check_tensor(
    folder: Path, hashed: tuple[ParamSpec, int, Future[dict[str, Any]]], records: Mapping[str, dict[str, Any]]
) -> None:
    spec, _, future = hashed
    recorded = records.get(spec.dotted)
    if not isinstance(recorded, dict):
        raise ValueError(f"{folder / manifest.FILE} has no record of tensor {spec.dotted}: convert again")
    for field, value in future.result().items():
        _check(f"{folder}: tensor {spec.dotted}", field, value, recorded.get(field))


def _check(subject: str, field: str, found: Any, recorded: Any) -> None:
    if found != recorded:
        short = [str(value)[:SHOWN_DIGITS] if field == "sha256" else value for value in (found, recorded)]
        raise ValueError(f"{subject} has {field} {short[0]}, but {manifest.FILE} records {short[1]}: {ADVICE}")
