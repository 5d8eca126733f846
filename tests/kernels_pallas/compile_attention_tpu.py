"""Compiles the attention kernels for TPUs at the real shapes on any machine, and prints the figures.

python -m tests.kernels_pallas.compile_attention_tpu v5e decode gradient   prints these programs' memory and
their kernels' bundles and spills, as JSON
python -m tests.kernels_pallas.compile_attention_tpu expect   writes expected/attention_tpu.json for this
libtpu
"""

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests import ROOT

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax

from kernels_pallas.packed_attention import packed_attention
from kernels_pallas.packed_attention import shapes as packed_shapes
from kernels_pallas.packed_attention.shapes import PackedShape
from kernels_pallas.paged_attention import PAGE, paged_attention
from kernels_pallas.paged_attention import shapes as paged_shapes
from kernels_pallas.paged_attention.shapes import PagedShape
from tests.kernels_pallas.compile_gated_delta_tpu import TOPOLOGIES, array, compiled, ints, listing, mesh_of

EXPECTED = ROOT / "tests" / "expected" / "attention_tpu.json"
POOL, TABLE = 8192, 4096  # all pages, and pages of a sequence of 262,144 tokens
FORWARD, QUERIES, KEYS_VALUES = "packed_attention", "packed_attention_queries", "packed_attention_keys_values"


def paged(shape: PagedShape) -> tuple[Callable, tuple]:
    T, S, H = sum(shape.query_lens), len(shape.query_lens), paged_shapes.WIDTH
    pages = array(POOL, PAGE, paged_shapes.KEY_HEADS * H)
    arguments = array(T, paged_shapes.HEADS, H), pages, pages, ints(S, TABLE), ints(S), ints(S), ints(S)
    return functools.partial(paged_attention, max_query_len=shape.max_query_len, backend="tpu"), arguments


def packed(shape: PackedShape) -> tuple[Callable, tuple]:
    """Returns packed attention between projections, whose heads lie side by side."""
    P, I, N, H = sum(shape.lengths), len(shape.lengths), packed_shapes.HEADS, packed_shapes.WIDTH

    def attend(q, k, v, starts, lengths):
        rows = (x.reshape(P, N, H) for x in (q, k, v))
        return packed_attention(*rows, starts, lengths, longest=shape.longest, backend="tpu").reshape(P, -1)

    return attend, (*[array(P, N * H)] * 3, ints(I), ints(I))


def gradient(shape: PackedShape) -> tuple[Callable, tuple]:
    attend, arguments = packed(shape)

    def pull(q, k, v, starts, lengths, bar):
        return jax.vjp(lambda *x: attend(*x, starts, lengths), q, k, v)[1](bar)

    return pull, (*arguments, arguments[0])


def named(table: tuple, name: str) -> PagedShape | PackedShape:
    return next(shape for shape in table if shape.name == name)


# Each program: its maker, its shape, and its kernels.
PROGRAMS = {
    "decode": (paged, named(paged_shapes.PAGED, "decode 100 x 1,024"), ("paged_attention",)),
    "prompts": (paged, named(paged_shapes.PAGED, "prefill 16 pieces"), ("paged_attention",)),
    "merged views": (packed, named(packed_shapes.PACKED, "1 photo, merged"), (FORWARD,)),
    "gradient": (gradient, named(packed_shapes.PACKED, "1 photo"), (FORWARD, QUERIES, KEYS_VALUES)),
}


def compiler_figures(chip: str, programs: list[str]) -> dict[str, dict]:
    """Returns the compiler's figures for each program.

    They are the bytes of its arguments and temporaries, and the bundles and spilled vector registers of its
    kernels.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        mesh = mesh_of(chip)
        for name in programs:
            make, shape, kernels = PROGRAMS[name]
            f, arguments = make(shape)
            memory = compiled(mesh, f, *arguments).memory_analysis()
            found[name] = {
                "arguments": memory.argument_size_in_bytes,
                "temporary": memory.temp_size_in_bytes,
                "kernels": {kernel: listing(Path(folder), kernel) for kernel in kernels},
            }
            for file in Path(folder).iterdir():
                file.unlink()  # the next program's kernels may have the same names
    return found


def expect() -> None:
    """Measures all chips, each in a process of its own, and writes the expected figures."""
    expected = {"libtpu": importlib.metadata.version("libtpu"), "jax": jax.__version__, "chips": {}}
    for chip in TOPOLOGIES:
        command = [sys.executable, "-m", "tests.kernels_pallas.compile_attention_tpu", chip, *PROGRAMS]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        expected["chips"][chip] = json.loads(done.stdout.strip().splitlines()[-1])
    EXPECTED.write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["expect"]:
            expect()
        case [chip, *programs]:
            print(json.dumps(compiler_figures(chip, programs)))
