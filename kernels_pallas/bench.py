"""Benchmarks the kernels.

`python -m kernels_pallas.bench [--only NAME] [--compare LIBRARY ...] [--json FILE]` prints one line for every
shape of every operation's table. A line holds microseconds on the device (the sum of all kernels, by the
profiler), GB/s of the bytes that must move at least, TFLOP/s of the work that must be done at least, and the
larger share of a limit. The limits are measured in the same run: a large copy (bytes read and written) and a
large bfloat16 product. The plain-XLA reference is measured too, and on request the libraries of `BASELINES`,
if they are installed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from kernels_pallas.backends import DEVICE_KIND_PREFIXES, REFERENCE, backend_of_device
from kernels_pallas.benchmarking import Benchmark, device_limits, device_microseconds
from kernels_pallas.causal_attention import bench as causal_attention
from kernels_pallas.gated_delta import bench as gated_delta
from kernels_pallas.gated_delta import packed_bench as packed_gated_delta
from kernels_pallas.packed_attention import bench as packed_attention
from kernels_pallas.paged_attention import bench as paged_attention
from kernels_pallas.top_k_top_p import bench as top_k_top_p

TABLES = gated_delta, packed_gated_delta, packed_attention, paged_attention, causal_attention, top_k_top_p
# Modules that measure another library, each in its own process: one process cannot run two profilers.
BASELINES = {
    "fla": ("kernels_pallas.gated_delta.baselines",),
    "fla-layer": ("kernels_pallas.gated_delta.baselines",),
    "torch": ("kernels_pallas.packed_attention.baselines", "kernels_pallas.paged_attention.baselines"),
    "cudnn": ("kernels_pallas.packed_attention.baselines", "kernels_pallas.causal_attention.baselines"),
    "cudnn-padded": ("kernels_pallas.packed_attention.baselines",),
}


def benchmarks() -> tuple[Benchmark, ...]:
    """Returns the benchmarks of all operations."""
    return tuple(benchmark for table in TABLES for benchmark in table.benchmarks())


def main() -> None:
    """Prints the table.

    Raises:
      SystemExit: there are no kernels for the present device, or a library cannot be measured here.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="operations and shapes whose names contain this")
    parser.add_argument(
        "--compare", "--beside", nargs="+", choices=BASELINES, default=[], help="other libraries to measure in the same run"
    )
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    device = jax.devices()[0].device_kind
    backend = backend_of_device(device)
    if backend is None:
        raise SystemExit(f"there are kernels for {' and '.join(DEVICE_KIND_PREFIXES)}, and the device is {device!r}")
    copy, product = device_limits()
    print(f"{device}, jax {jax.__version__}: copies {copy / 1e12:.2f} TB/s, products {product / 1e12:.0f} TFLOP/s")
    rows = []
    baselines = {library: baseline_microseconds(library, options.only) for library in options.compare}
    for benchmark in benchmarks():
        if options.only in benchmark.name:
            others = {library: figures[benchmark.name] for library, figures in baselines.items() if benchmark.name in figures}
            rows.append(measure(benchmark, backend, copy, product) | {"baselines_us": others})
            print(line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"device": device, "jax": jax.__version__, "copy": copy, "product": product, "rows": rows})
        )


def baseline_microseconds(library: str, only: str) -> dict[str, float]:
    """Returns another library's microseconds by the names of the benchmarks that contain `only`."""
    figures: dict[str, float] = {}
    for module in BASELINES[library]:
        done = subprocess.run([sys.executable, "-m", module, library, only], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{library} cannot be measured here: {done.stderr.strip().splitlines()[-1]}")
        figures |= json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def measure(benchmark: Benchmark, backend: str, copy: float, product: float) -> dict[str, Any]:
    """Measures one benchmark and the reference; `copy` and `product` are `device_limits()`."""
    us = device_microseconds(benchmark.run(backend))
    limit = max(benchmark.bytes / copy, benchmark.flops / product) * 1e6
    return {
        "name": benchmark.name,
        "us": us,
        "gb_s": benchmark.bytes / us / 1e3,
        "tflop_s": benchmark.flops / us / 1e6,
        "of_limit": limit / us,
        "reference_us": device_microseconds(benchmark.run(REFERENCE)),
    }


def line(row: dict[str, Any]) -> str:
    """Returns a line of the printed table."""
    others = {REFERENCE: row["reference_us"], **row["baselines_us"]}
    compared = ", ".join(f"{name} {us:.1f} us ({us / row['us']:.2f} x)" for name, us in others.items() if us)
    speed = f"{row['gb_s']:7.0f} GB/s {row['tflop_s']:6.1f} TFLOP/s {row['of_limit']:4.0%} of the limit"
    return f"{row['name']:44} {row['us']:8.1f} us {speed}; {compared}"


if __name__ == "__main__":
    main()
