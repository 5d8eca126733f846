"""Measures how the kernels had best cut their work on the present device: `python -m kernels_pallas.tune [--only KERNEL]`.

Every candidate of every kernel is timed on the real shapes of its class, as the benchmark times them, and the fastest goes into
`tuning.json` under the device's kind.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import jax

from kernels_pallas.backends import CHIPS
from kernels_pallas.bench import device_microseconds
from kernels_pallas.bench import works as all_works
from kernels_pallas.gated_delta import shapes as gated_delta
from kernels_pallas.packed_attention import shapes as packed_attention
from kernels_pallas.paged_attention import shapes as paged_attention
from kernels_pallas.tuning import FILE, Cut, Table, Tuned, nearest, read, using, write

TUNED = (*gated_delta.TUNED, *packed_attention.TUNED, *paged_attention.TUNED)


def main() -> None:
    """Writes the present device's entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kernels whose names contain this")
    only, kind = parser.parse_args().only, jax.devices()[0].device_kind
    family = next((family for family, kinds in CHIPS.items() if kind.startswith(kinds)), None)
    if family is None:
        raise SystemExit(f"there are kernels for {' and '.join(CHIPS)}, and the device is {kind!r}")
    table = read(FILE)
    for tuned in TUNED:
        if tuned.family == family and only in tuned.kernel:
            entry = nearest(table, family, kind) | {tuned.kernel: tune(tuned, kind, table)}
            table = table | {family: table[family] | {kind: entry}}
            write(FILE, table)  # what has been measured is kept if the rest is not


def tune(tuned: Tuned, kind: str, table: Table, timer: Callable[[Callable[[], Any]], float] = device_microseconds) -> list[Cut]:
    """The fastest of the candidates for each class of sizes; `timer` gives the microseconds of a call."""
    works = {work.name: work for work in all_works()}
    cuts = []
    for most, names in tuned.works.items():
        times = []
        for cut in tuned.candidates:
            trial = {tuned.family: {kind: nearest(table, tuned.family, kind) | {tuned.kernel: [cut]}}}
            with using(trial):
                jax.clear_caches()  # what was traced with another cut
                times.append(sum(timer(works[name].run(tuned.family)) for name in names))
            print(f"{tuned.kernel}, {', '.join(names)}: {json.dumps(cut)} {times[-1]:.1f} us", flush=True)
        best = tuned.candidates[times.index(min(times))]
        cuts.append(best if most is None else {"most": most} | best)
    return cuts


if __name__ == "__main__":
    main()
