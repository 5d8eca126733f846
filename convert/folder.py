"""Writes folders atomically, and copies the side files of a checkpoint."""

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minicpmv46_jax.checkpoint import SIDE_FILES
from minicpmv46_jax.config import read_json

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def atomic_folder(out: Path, nbytes: int) -> Iterator[Path]:
    """Yields a temporary folder beside `out`: renamed to `out` at the end, or removed if the block raises.

    Ctrl-C counts as raising. Temporary folders that killed runs on this machine left beside `out` are removed
    first.

    Args:
      out: the final folder.
      nbytes: size of its weights in bytes.

    Raises:
      ValueError: `out` exists and is not an empty folder, or is not writable; the disk has less than `nbytes`
        free, or is full.
    """
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"{out} exists and is not an empty folder: choose another one, or remove it first")
    partial = out.absolute().with_name(f"{out.absolute().name}.partial-{socket.gethostname()}-{os.getpid()}")
    try:
        _remove_stale(out)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < nbytes:
            raise ValueError(f"{out} takes {nbytes / 1e6:,.0f} MB, but its disk has {free / 1e6:,.0f} MB left")
        yield partial
        partial.rename(out)
    except BaseException as error:
        _remove(partial)
        if _disk_is_full(error):
            raise ValueError(f"no space left on the disk of {out.absolute().parent}: nothing was written") from error
        if isinstance(error, PermissionError):
            raise ValueError(f"{out} may not be written: {error}") from error
        raise


def copy_side_files(source: Path, out: Path, dtype: str | None) -> list[Path]:
    """Copies the side files of `source` and returns their paths in `source`.

    The copies have the same bytes, with one exception: if config.json has another dtype than `dtype`, it is
    rewritten, because transformers would cast the tensors back on loading.

    Args:
      source: a released or converted folder.
      out: the folder to copy to.
      dtype: the dtype of all tensors in `out`; None if dtypes are unchanged or differ.
    """
    files = [source / name for name in SIDE_FILES if (source / name).is_file()]
    for file in files:
        shutil.copyfile(file, out / file.name)
    config = read_json(source / "config.json")
    renamed = config if dtype is None else _replace_dtype(config, dtype)
    if renamed != config:
        (out / "config.json").write_text(json.dumps(renamed, indent=2) + "\n", encoding="utf-8")
    return files


def _replace_dtype(config: Any, dtype: str) -> Any:
    """Returns the JSON value with every `dtype` and `torch_dtype` field replaced; `mamba_ssm_dtype` stays."""
    if not isinstance(config, dict):
        return config
    named = ("dtype", "torch_dtype")
    return {key: dtype if key in named and value is not None else _replace_dtype(value, dtype) for key, value in config.items()}


def _remove_stale(out: Path) -> None:
    prefix = f"{out.absolute().name}.partial-{socket.gethostname()}-"
    for path in out.absolute().parent.glob("*.partial-*"):
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdigit() and not _is_alive(int(pid)):
            _remove(path)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # left by an earlier call of this process, or by a process that had the same number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    """Removes a folder until it has stayed absent for a second: a failed Orbax write may still add files."""
    absent = 0
    for _ in range(100):
        shutil.rmtree(path, ignore_errors=True)
        absent = 0 if path.exists() else absent + 1
        if absent == 10:
            return
        time.sleep(0.1)


def _disk_is_full(error: BaseException | None) -> bool:
    """Returns whether an error or one of its causes is a full disk.

    Orbax and tensorstore keep the system's message but not its number, so messages are searched too.
    """
    while error is not None:
        if getattr(error, "errno", None) in FULL_DISK or any(os.strerror(number) in str(error) for number in FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False
