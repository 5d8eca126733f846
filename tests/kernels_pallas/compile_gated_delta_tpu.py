"""Compiles the gated delta kernels at the real shapes for TPUs that are not here, and prints figures.

python -m tests.kernels_pallas.compile_gated_delta_tpu memory v5e      bytes of the operations, as JSON
python -m tests.kernels_pallas.compile_gated_delta_tpu schedule v5e    bundles and spills per kernel, as JSON
python -m tests.kernels_pallas.compile_gated_delta_tpu expect          rewrites the expected figures
"""

import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests import ROOT

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from kernels_pallas import gated_delta
from kernels_pallas.gated_delta import shapes, tpu_backward, tpu_chunked
from kernels_pallas.gated_delta.packing import CHUNK, max_chunks
from kernels_pallas.gated_delta.tpu_math import LANES
from kernels_pallas.tuning import tuned_config

TOPOLOGIES = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v5p": "v5p:1x1x1"}
EXPECTED = ROOT / "tests" / "expected" / "gated_delta_tpu.json"
KERNELS = {"forward": "gated_delta_chunked", "backward": "gated_delta_backward", "recurrent": "gated_delta_recurrent"}
PROMPT = next(shape for shape in shapes.CHUNKED if shape.name == "8 x 1,024")
STEP = next(shape for shape in shapes.RECURRENT if shape.name == "100 slots")

N, V, K, C, W = shapes.HEADS, shapes.WIDTH, shapes.WIDTH, shapes.CHANNELS, shapes.CONV


def array(*shape: int, dtype: object = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


floats, ints = functools.partial(array, dtype=jnp.float32), functools.partial(array, dtype=jnp.int32)
LAYER = gated_delta.Layer(array(C, W), array(N), array(N))
S, T = len(PROMPT.lengths), sum(PROMPT.lengths)
CONTINUOUS = (array(T, C), array(T, N), array(T, N), LAYER, floats(S, N, V, K), array(S, W - 1, C))
SEQUENCES = (ints(S), ints(S), ints(4, 2))


def forward(*arguments: jax.Array) -> gated_delta.Chunked:
    return gated_delta.chunked(*arguments, backend="tpu")


def gradient(continuous: tuple, sequences: tuple, cotangents: gated_delta.Chunked) -> tuple:
    """Returns cotangents of all differentiable arguments; the forward pass is included."""
    return jax.vjp(lambda *x: forward(*x, *sequences), *continuous)[1](cotangents)


def step(qkv, a, b, z, layer, norm, recurrent_state, conv_state, slots, keep):
    return gated_delta.recurrent(qkv, a, b, z, layer, norm, 1e-6, recurrent_state, conv_state, slots, keep, backend="tpu")


def step_arguments() -> tuple:
    B, T = STEP.rows, STEP.tokens
    tokens = array(B, T, C), array(B, T, N), array(B, T, N), array(B, T, N, V)
    return *tokens, LAYER, array(V), floats(B, N, V, K), array(B, W - 1, C), ints(B), ints(B)


def backward_kernel(qkv, gates, states, d_out, d_final_states, d_snapshots, query_starts, query_lens, snapshots):
    windows = tpu_chunked.chunk_windows(query_starts, query_lens, snapshots, T)
    return tpu_backward.backward(
        qkv, gates, states, d_out, d_final_states, d_snapshots, windows, tuned_config("tpu", "gated_delta").heads
    )


def backward_arguments() -> tuple:
    chunks = max_chunks(T, S)
    tokens = array(chunks, CHUNK, C), floats(chunks, CHUNK, LANES), floats(chunks, N, V, K), array(chunks, CHUNK, N * V)
    return *tokens, floats(S, N, V, K), floats(4, N, V, K), *SEQUENCES


def compiled(mesh: Mesh, f: Callable, *args: object, **jit: object) -> jax.stages.Compiled:
    with jax.set_mesh(mesh):
        return jax.jit(f, **jit).trace(*args).lower(lowering_platforms=("tpu",)).compile()


def mesh_of(chip: str) -> Mesh:
    described = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip], chips_per_host_bounds=(1, 1, 1))
    return Mesh(np.array(described.devices), ("chip",))


def memory(chip: str) -> dict[str, dict[str, int]]:
    """Returns bytes of arguments, temporaries and donated arguments of each operation."""
    mesh = mesh_of(chip)
    with jax.set_mesh(mesh):
        cotangents = jax.eval_shape(forward, *CONTINUOUS, *SEQUENCES)
    programs = {
        "forward": compiled(mesh, forward, *CONTINUOUS, *SEQUENCES, donate_argnums=4),
        "backward": compiled(mesh, gradient, CONTINUOUS, SEQUENCES, cotangents),
        "recurrent": compiled(mesh, step, *step_arguments(), donate_argnums=(6, 7)),
    }
    found = {name: program.memory_analysis() for name, program in programs.items()}
    return {
        name: {
            "arguments": m.argument_size_in_bytes,
            "temporary": m.temp_size_in_bytes,
            "aliased": m.alias_size_in_bytes,
        }
        for name, m in found.items()
    }


def schedule(chip: str) -> dict[str, dict[str, int]]:
    """Returns instruction bundles and spilled vector registers per kernel, from the compiler's listings."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        mesh = mesh_of(chip)
        compiled(mesh, forward, *CONTINUOUS, *SEQUENCES, donate_argnums=4)
        compiled(mesh, backward_kernel, *backward_arguments())
        compiled(mesh, step, *step_arguments(), donate_argnums=(6, 7))
        return {name: listing(Path(folder), kernel) for name, kernel in KERNELS.items()}


def listing(folder: Path, kernel: str) -> dict[str, int]:
    """Counts bundles and spills in the listing `<time>-<kernel>.<number>-<pass>-final_bundles.txt`.

    It has one line per bundle, numbered in hexadecimal. Differentiation adds a prefix and a suffix to the
    kernel's name: `transpose_jvp_<kernel>__`.
    """
    name = re.compile(rf"-(jvp_|transpose_)*{kernel}_*\.\d+-\d+-final_bundles\.txt")
    (file,) = (file for file in folder.iterdir() if name.search(file.name))
    lines = [line for line in file.read_text().splitlines() if re.match(r" *(0x)?[0-9a-f]+ +", line)]
    return {"bundles": len(lines), "spills": sum(len(re.findall(r"\bvst [^;]*_spill", line)) for line in lines)}


def expect() -> None:
    """Measures all chips, each in a process of its own, and writes the expected figures."""
    expected = {"libtpu": importlib.metadata.version("libtpu"), "jax": jax.__version__, "memory": {}, "schedule": {}}
    for kind in ("memory", "schedule"):
        for chip in TOPOLOGIES:
            command = [sys.executable, "-m", "tests.kernels_pallas.compile_gated_delta_tpu", kind, chip]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            expected[kind][chip] = json.loads(done.stdout.strip().splitlines()[-1])
    EXPECTED.parent.mkdir(exist_ok=True)
    EXPECTED.write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["expect"]:
            expect()
        case ["memory", chip]:
            print(json.dumps(memory(chip)))
        case ["schedule", chip]:
            print(json.dumps(schedule(chip)))
