"""Reads and writes the converted weights: one ordinary Orbax checkpoint, a few tensors at a time.

    tree = orbax.checkpoint.StandardCheckpointer().restore(folder / "params")  # numpy arrays, by plain Orbax

Quirks:
- Layer numbers are strings on disk, because Orbax turns integer keys into strings.
- Leaves are saved as numpy arrays, which restore on any machine. A saved `jax.Array` needs its devices.
- Leaves are not compressed: zstd makes bfloat16 a fifth smaller, and reading and writing about twice as slow.
"""

import contextlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental.v1 import Context, partial

from minicpmv46_jax.checkpoint.names import ParamSpec, Shape

# Bytes saved or restored at once; a larger tensor is a group of its own. Groups bound memory, and they share
# the fixed cost of an Orbax call (30 ms).
GROUP_BYTES = 64 * 2**20
TREE_FILE = "_METADATA"


def write(
    path: Path, tensors: Iterable[tuple[ParamSpec, np.ndarray]], on_saved: Callable[[int], Any] = lambda nbytes: None
) -> None:
    """Writes an Orbax checkpoint, with at most one group of tensors in memory.

    Args:
      path: the checkpoint's folder, which must not exist.
      tensors: each parameter spec with its values; consumed one at a time.
      on_saved: called with the number of bytes after each group.
    """
    session = path.with_name(path.name + "-session").absolute()
    group: dict[ParamSpec, np.ndarray] = {}
    for spec, tensor in tensors:
        if group and _nbytes(group) + tensor.nbytes > GROUP_BYTES:
            _save(session, group, on_saved)
        group[spec] = tensor
        del tensor  # else it would stay in memory while the generator makes the next one
        if _nbytes(group) >= GROUP_BYTES:
            _save(session, group, on_saved)
    if group:
        _save(session, group, on_saved)
    with _delay_interrupts():
        partial.finalize(session)
    # Orbax writes its item into a subfolder of the session. Moved out, it has the layout that every Orbax
    # call restores.
    item = next(child for child in session.iterdir() if (child / TREE_FILE).is_file())
    item.rename(path)
    shutil.rmtree(session)


def read_metadata(path: Path) -> dict[str, tuple[Shape, str]]:
    """Returns shape and dtype of every tensor by dotted path.

    Raises:
      ValueError: `path` is not an Orbax checkpoint, or its metadata is damaged.
    """
    if not (path / TREE_FILE).is_file():
        raise ValueError(f"{path} is not an Orbax checkpoint: {TREE_FILE} is missing")
    with _one_line_errors(path):
        tree = ocp.PyTreeCheckpointHandler().metadata(path.absolute()).tree
    return {name: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for name, leaf in _leaves(tree)}


def read(
    path: Path, wanted: Iterable[ParamSpec], metadata: dict[str, tuple[Shape, str]]
) -> Iterator[tuple[ParamSpec, np.ndarray]]:
    """Reads the wanted tensors in order and in their own dtypes, a group at a time.

    Args:
      path: the checkpoint's folder.
      wanted: specs of the tensors to read.
      metadata: the result of `read_metadata`.

    Raises:
      ValueError: the data cannot be read; the message names the checkpoint.
    """
    for group in _group_by_bytes(list(wanted), metadata):
        restored = dict(_leaves(_restore(path.absolute(), group)))
        for spec in group:
            yield spec, restored.pop(spec.dotted)


def _save(session: Path, group: dict[ParamSpec, np.ndarray], on_saved: Callable[[int], Any]) -> None:
    """Saves the group to the session, then clears the group."""
    nbytes = _nbytes(group)
    with _delay_interrupts(), _without_compression():
        partial.save(session, _nest(group))
    group.clear()
    on_saved(nbytes)


def _without_compression() -> Context:
    context = Context()
    context.array.saving.use_compression = False
    return context


@contextlib.contextmanager
def _delay_interrupts() -> Iterator[None]:
    """Delays Ctrl-C until the block ends: inside Orbax, it would leave threads that still write files."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals and may set handlers
        return
    pending = []
    previous = signal.signal(signal.SIGINT, lambda *_: pending.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending:
        raise KeyboardInterrupt


def _group_by_bytes(wanted: list[ParamSpec], metadata: dict[str, tuple[Shape, str]]) -> Iterator[list[ParamSpec]]:
    group, held = [], 0
    for spec in wanted:
        shape, dtype = metadata[spec.dotted]
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if group and held + nbytes > GROUP_BYTES:
            yield group
            group, held = [], 0
        group, held = [*group, spec], held + nbytes
    if group:
        yield group


def _restore(path: Path, group: list[ParamSpec]) -> Any:
    item = _nest(dict.fromkeys(group, 0))
    restore_args = _nest(dict.fromkeys(group, ocp.RestoreArgs(restore_type=np.ndarray)))
    with _one_line_errors(path):
        return ocp.PyTreeCheckpointHandler().restore(
            path, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        )


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Raises ValueError of one line that names the checkpoint for any error of the block."""
    try:
        yield
    except Exception as error:  # tensorstore and Orbax raise many types for a missing or damaged file
        first = str(error).strip().splitlines()
        raise ValueError(f"{path} cannot be read: {first[0] if first else type(error).__name__}") from error


def _nest(leaves: dict[ParamSpec, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for spec, leaf in leaves.items():
        node = tree
        for key in spec.path[:-1]:
            node = node.setdefault(str(key), {})
        node[str(spec.path[-1])] = leaf
    return tree


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nbytes(group: dict[ParamSpec, np.ndarray]) -> int:
    return sum(tensor.nbytes for tensor in group.values())
