"""Folders that appear whole or not at all, and the small files that travel beside the weights."""

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
    """A folder beside `out` to write into; it becomes `out` at the end, or vanishes if the block raises (Ctrl-C too).

    What a killed run of this machine left beside `out` is removed first.

    Args:
      out: the folder to be.
      nbytes: what its weights will take.

    Raises:
      ValueError: `out` exists and is not an empty folder, or may not be written; the disk has less than `nbytes` or fills up.
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
    """Copies config, tokenizer, template and processor files; returns those of `source`.

    They keep their bytes, but for one case: config.json naming another dtype than `dtype`, the one that the tensors now have
    (transformers would cast them back on loading). None says that the dtypes are as they were.
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
    """The same JSON with every `dtype` or `torch_dtype` that it names replaced (`mamba_ssm_dtype` is no such field)."""
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
        return False  # an earlier call of this very process, or of another that had its number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    """Removes a folder into which a failed Orbax write may still be putting its last files: until it has stayed away a second."""
    away = 0
    for _ in range(100):
        shutil.rmtree(path, ignore_errors=True)
        away = 0 if path.exists() else away + 1
        if away == 10:
            return
        time.sleep(0.1)


def _disk_is_full(error: BaseException | None) -> bool:
    """Looks through what an error was raised from: Orbax and tensorstore carry the system's message, not its number."""
    while error is not None:
        if getattr(error, "errno", None) in FULL_DISK or any(os.strerror(number) in str(error) for number in FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False
