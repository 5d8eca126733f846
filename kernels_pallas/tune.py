"""Tunes the kernels for the present device: `python -m kernels_pallas.tune [--only KERNEL]`.

Every candidate of every kernel is timed on the benchmarks of its class of sizes. The fastest goes into
`tuning.json` under the device's kind.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import jax

from kernels_pallas.backends import DEVICE_KIND_PREFIXES, backend_of_device
from kernels_pallas.bench import benchmarks
from kernels_pallas.benchmarking import device_microseconds
from kernels_pallas.gated_delta import shapes as gated_delta
from kernels_pallas.packed_attention import shapes as packed_attention
from kernels_pallas.paged_attention import shapes as paged_attention
from kernels_pallas.tuning import FILE, Config, Table, TuningSpace, nearest, read, using, write

TUNING_SPACES = (*gated_delta.TUNING_SPACES, *packed_attention.TUNING_SPACES, *paged_attention.TUNING_SPACES)


def main() -> None:
    """Writes the present device's entry.

    Raises:
      SystemExit: there are no kernels for the present device.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kernels whose names contain this")
    only, kind = parser.parse_args().only, jax.devices()[0].device_kind
    backend = backend_of_device(kind)
    if backend is None:
        raise SystemExit(f"there are kernels for {' and '.join(DEVICE_KIND_PREFIXES)}, and the device is {kind!r}")
    table = read(FILE)
    for space in TUNING_SPACES:
        if space.backend == backend and only in space.kernel:
            entry = nearest(table, backend, kind) | {space.kernel: tune(space, kind, table)}
            table = table | {backend: table[backend] | {kind: entry}}
            write(FILE, table)  # after each kernel, so that an interrupted run keeps its measurements


def tune(
    space: TuningSpace, kind: str, table: Table, timer: Callable[[Callable[[], Any]], float] = device_microseconds
) -> list[Config]:
    """Returns the fastest candidate for each class of sizes; `timer` returns the microseconds of a call."""
    by_name = {benchmark.name: benchmark for benchmark in benchmarks()}
    configs = []
    for most, names in space.benchmarks.items():
        times = []
        for candidate in space.candidates:
            trial = {space.backend: {kind: nearest(table, space.backend, kind) | {space.kernel: [candidate]}}}
            with using(trial):
                jax.clear_caches()  # of programs traced with another candidate
                times.append(sum(timer(by_name[name].run(space.backend)) for name in names))
            print(f"{space.kernel}, {', '.join(names)}: {json.dumps(candidate)} {times[-1]:.1f} us", flush=True)
        best = space.candidates[times.index(min(times))]
        configs.append(best if most is None else {"most": most} | best)
    return configs


if __name__ == "__main__":
    main()
