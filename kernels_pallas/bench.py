"""How fast the kernels are: `python -m kernels_pallas.bench [--only NAME] [--beside LIBRARY ...] [--json FILE]`.

For every shape of every operation's table: microseconds on the device (all its kernels, as the profiler sees them), GB/s
of the bytes that must move at least, TFLOP/s of the work that must be done at least, and the larger share of a limit, measured on
the spot: a large copy (bytes read and written), a large bfloat16 product. Beside it the plain-XLA reference and, where asked for
and installed, flash-linear-attention's Triton kernels and PyTorch's and cuDNN's attention, in the same run.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.backends import CHIPS

RIVALS = {  # modules that measure another library, in a process of their own: two profilers cannot watch the chip from one
    "fla": ("kernels_pallas.gated_delta.baselines",),
    "fla-layer": ("kernels_pallas.gated_delta.baselines",),
    "torch": ("kernels_pallas.packed_attention.baselines", "kernels_pallas.paged_attention.baselines"),
    "cudnn": ("kernels_pallas.packed_attention.baselines", "kernels_pallas.causal_attention.baselines"),
    "cudnn-padded": ("kernels_pallas.packed_attention.baselines",),
}
CALLS = 10  # a measurement: the mean of so many calls on the device


@dataclasses.dataclass(frozen=True)
class Work:
    """One line of the table.

    Attributes:
      name: the operation and the shape.
      run: called with a backend's name, gives a function without arguments that dispatches one call and returns its results.
      bytes, flops: the least that must be moved and computed.
    """

    name: str
    run: Callable[[str], Callable[[], Any]]
    bytes: float
    flops: float


def pulling_back(forward: Callable[..., jax.Array], *arguments: Any) -> Callable[[], Any]:
    """A call of the backward pass alone, of all arguments, from a random cotangent."""
    out, pull = jax.vjp(jax.jit(forward), *arguments)
    cotangent = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
    backward = jax.jit(lambda pull, cotangent: pull(cotangent))
    return lambda: backward(pull, cotangent)


def device_microseconds(call: Callable[[], Any]) -> float:
    """Mean device time of a call, all of its kernels summed; the first call, which compiles, is not counted."""
    return sum(us for _, us in kernels(call, CALLS)) / CALLS


def kernels(call: Callable[[], Any], calls: int) -> list[tuple[str, float]]:
    """Name and microseconds of every kernel that the device ran in so many calls; a first, which compiles, is not counted."""
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())
        return list(_events(Path(folder)))


def _events(folder: Path) -> Iterator[tuple[str, float]]:
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if plane.name.startswith("/device:"):
                for line in plane.lines:
                    if line.name.startswith(("Stream", "XLA Ops")) and "Async" not in line.name:
                        yield from ((event.name, event.duration_ns / 1e3) for event in line.events)


def limits() -> tuple[float, float]:
    """Bytes a second of a large copy, read and written, and operations a second of a large bfloat16 product."""
    x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    y = jax.random.normal(jax.random.key(1), (1 << 30,), jnp.bfloat16)
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    product_us, copy_us = device_microseconds(lambda: product(x, x)), device_microseconds(lambda: copy(y))
    return 2 * y.nbytes / copy_us * 1e6, 2 * x.shape[0] ** 3 / product_us * 1e6


def works() -> tuple[Work, ...]:
    """Every operation's table."""
    from kernels_pallas.causal_attention import bench as causal_attention
    from kernels_pallas.gated_delta import bench as gated_delta
    from kernels_pallas.gated_delta import packed_bench as packed_rule
    from kernels_pallas.packed_attention import bench as packed_attention
    from kernels_pallas.paged_attention import bench as paged_attention
    from kernels_pallas.top_k_top_p import bench as nucleus

    tables = gated_delta, packed_rule, packed_attention, paged_attention, causal_attention, nucleus
    return tuple(work for table in tables for work in table.works())


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="operations and shapes whose names contain this")
    parser.add_argument("--beside", nargs="+", choices=RIVALS, default=[], help="other libraries to measure in the same run")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    given = parser.parse_args()
    device = jax.devices()[0].device_kind
    if jax.default_backend() not in CHIPS:
        raise SystemExit(f"there are kernels for {' and '.join(CHIPS)}, and the device is {device!r}")
    copy, product = limits()
    print(f"{device}, jax {jax.__version__}: copies {copy / 1e12:.2f} TB/s, products {product / 1e12:.0f} TFLOP/s")
    rows = []
    rivals = {library: beside(library, given.only) for library in given.beside}
    for work in works():
        if given.only in work.name:
            others = {library: figures[work.name] for library, figures in rivals.items() if work.name in figures}
            rows.append(measured(work, copy, product) | {"rivals_us": others})
            print(line(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(
            json.dumps({"device": device, "jax": jax.__version__, "copy": copy, "product": product, "rows": rows})
        )


def beside(library: str, only: str) -> dict[str, float]:
    """Another library's microseconds, by the names of our lines."""
    figures: dict[str, float] = {}
    for module in RIVALS[library]:
        done = subprocess.run([sys.executable, "-m", module, library, only], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{library} cannot be measured here: {done.stderr.strip().splitlines()[-1]}")
        figures |= json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def measured(work: Work, copy: float, product: float) -> dict[str, Any]:
    """A line's figures."""
    ours = device_microseconds(work.run(jax.default_backend()))
    limit = max(work.bytes / copy, work.flops / product) * 1e6
    return {
        "name": work.name,
        "us": ours,
        "gb_s": work.bytes / ours / 1e3,
        "tflop_s": work.flops / ours / 1e6,
        "of_limit": limit / ours,
        "reference_us": device_microseconds(work.run("reference")),
    }


def line(row: dict[str, Any]) -> str:
    """A line as it is printed."""
    others = {"reference": row["reference_us"], **row["rivals_us"]}
    beside = ", ".join(f"{name} {us:.1f} us ({us / row['us']:.2f} x)" for name, us in others.items() if us)
    speed = f"{row['gb_s']:7.0f} GB/s {row['tflop_s']:6.1f} TFLOP/s {row['of_limit']:4.0%} of the limit"
    return f"{row['name']:44} {row['us']:8.1f} us {speed}; {beside}"


if __name__ == "__main__":
    main()
