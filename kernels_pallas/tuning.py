"""Tuned configurations of the kernels, as data: block sizes, pipeline depths and the like, by device kind.

`tuning.json` holds a list of configurations for each backend, device kind and kernel. The first one whose
`most` is not below the size of the work counts: `{"most": 127, "groups": 1}, {"groups": 2}`. A device without
an entry uses the entry whose name has the longest common start with its own. `python -m kernels_pallas.tune`
measures the present device and writes its entry.
"""

import contextlib
import contextvars
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from kernels_pallas.backends import device_kind

FILE = Path(__file__).parent / "tuning.json"
Config = dict[str, int]
Table = dict[str, dict[str, dict[str, list[Config]]]]  # configurations by backend, device kind and kernel


class TuningSpace(NamedTuple):
    """The configurations of a kernel that the tuner chooses from; each operation's shapes.py lists its own.

    Attributes:
      backend: the backend that the kernel belongs to.
      kernel: the kernel's name in the file.
      candidates: the configurations; all of them compile.
      benchmarks: for each class of sizes, by its largest size (None: no bound), the names of the benchmarks
        that measure it.
    """

    backend: str
    kernel: str
    candidates: tuple[Config, ...]
    benchmarks: dict[int | None, tuple[str, ...]]


def tuned_config(backend: str, kernel: str, size: int = 0) -> SimpleNamespace:
    """Returns a kernel's configuration for work of this size, on the device being compiled for."""
    configs = nearest(_in_use.get() or read(FILE), backend, device_kind())[kernel]
    config = next(config for config in configs if size <= config.get("most", size))
    return SimpleNamespace(**{name: value for name, value in config.items() if name != "most"})


def nearest(table: Table, backend: str, kind: str) -> dict[str, list[Config]]:
    """Returns the backend's entry whose device kind has the longest common start with this one.

    The first of several counts.
    """

    def shared(name: str) -> int:
        return max(length for length in range(len(name) + 1) if kind.startswith(name[:length]))

    return table[backend][max(table[backend], key=shared)]


@functools.cache
def read(path: Path) -> Table:
    """Reads a table from a file.

    Raises:
      ValueError: a list of configurations does not end in one for all sizes, or its bounds do not increase.
    """
    table = json.loads(path.read_text())
    for backend, kinds in table.items():
        for kind, kernels in kinds.items():
            for kernel, configs in kernels.items():
                bounds = [config.get("most") for config in configs]
                *bounded, last = bounds or [0]
                if last is not None or None in bounded or bounded != sorted(set(bounded)):
                    raise ValueError(
                        f"{path.name}: {backend}, {kind}, {kernel} has bounds {bounds}, which must go up and end in none"
                    )
    return table


def write(path: Path, table: Table) -> None:
    """Writes a table with one line for each kernel, so that a change of one kernel changes one line."""
    backends = []
    for backend, kinds in table.items():
        entries = []
        for kind, kernels in kinds.items():
            lines = (f"      {json.dumps(kernel)}: {json.dumps(configs)}" for kernel, configs in kernels.items())
            entries.append(f"    {json.dumps(kind)}: {{\n" + ",\n".join(lines) + "\n    }")
        backends.append(f"  {json.dumps(backend)}: {{\n" + ",\n".join(entries) + "\n  }")
    path.write_text("{\n" + ",\n".join(backends) + "\n}\n")


_in_use: contextvars.ContextVar[Table | None] = contextvars.ContextVar("tuning_in_use", default=None)


@contextlib.contextmanager
def using(table: Table) -> Iterator[None]:
    """Replaces the file's table for programs traced inside the context; for the tuner and for tests."""
    token = _in_use.set(table)
    try:
        yield
    finally:
        _in_use.reset(token)
