"""How the kernels cut their work, as data: block sizes, depths of pipelines and the like, by device kind.

`tuning.json` holds for each family of chips, device kind and kernel a list of cuts; the first that is meant for the work's size
counts: `{"most": 127, "groups": 1}, {"groups": 2}`. A device without an entry takes that whose name begins most like its own.
`python -m kernels_pallas.tune` measures the present device and writes its entry.
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
Cut = dict[str, int]
Table = dict[str, dict[str, dict[str, list[Cut]]]]  # cuts by family, device kind and kernel


class Tuned(NamedTuple):
    """A kernel that leaves something to choose; each operation's shapes.py lists its own.

    Attributes:
      family: of the chips that it is for.
      kernel: its name in the file.
      candidates: the cuts to choose from; all of them compile.
      works: for each class of sizes, by the largest size in it (None: all above), the benchmark's lines to measure it by.
    """

    family: str
    kernel: str
    candidates: tuple[Cut, ...]
    works: dict[int | None, tuple[str, ...]]


def chosen(family: str, kernel: str, size: int = 0) -> SimpleNamespace:
    """The cut of a kernel for work of this size, on the device being compiled for."""
    cuts = nearest(_in_use.get() or read(FILE), family, device_kind())[kernel]
    cut = next(cut for cut in cuts if size <= cut.get("most", size))
    return SimpleNamespace(**{name: value for name, value in cut.items() if name != "most"})


def nearest(table: Table, family: str, kind: str) -> dict[str, list[Cut]]:
    """The family's entry whose device kind begins most like this one; of several the first."""

    def shared(name: str) -> int:
        return max(length for length in range(len(name) + 1) if kind.startswith(name[:length]))

    return table[family][max(table[family], key=shared)]


@functools.cache
def read(path: Path) -> Table:
    """The file's table.

    Raises:
      ValueError: a list of cuts does not end in one for all sizes, or its bounds do not go up.
    """
    table = json.loads(path.read_text())
    for family, kinds in table.items():
        for kind, kernels in kinds.items():
            for kernel, cuts in kernels.items():
                bounds = [cut.get("most") for cut in cuts]
                *bounded, last = bounds or [0]
                if last is not None or None in bounded or bounded != sorted(set(bounded)):
                    raise ValueError(
                        f"{path.name}: {family}, {kind}, {kernel} has bounds {bounds}, which must go up and end in none"
                    )
    return table


def write(path: Path, table: Table) -> None:
    """A line a kernel, so that a change of one is a change of one line."""
    families = []
    for family, kinds in table.items():
        entries = []
        for kind, kernels in kinds.items():
            lines = (f"      {json.dumps(kernel)}: {json.dumps(cuts)}" for kernel, cuts in kernels.items())
            entries.append(f"    {json.dumps(kind)}: {{\n" + ",\n".join(lines) + "\n    }")
        families.append(f"  {json.dumps(family)}: {{\n" + ",\n".join(entries) + "\n  }")
    path.write_text("{\n" + ",\n".join(families) + "\n}\n")


_in_use: contextvars.ContextVar[Table | None] = contextvars.ContextVar("tuning_in_use", default=None)


@contextlib.contextmanager
def using(table: Table) -> Iterator[None]:
    """Another table than the file's, for what is traced inside; only the tuner and tests want that."""
    token = _in_use.set(table)
    try:
        yield
    finally:
        _in_use.reset(token)
