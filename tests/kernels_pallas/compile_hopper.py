"""Compiles the Hopper kernels at the model's shapes on any machine, and prints ptxas's figures.

`python -m tests.kernels_pallas.compile_hopper` prints the figures of tests/expected/hopper.json. With
`candidates` it compiles the kernels with every configuration of the tuner.
"""

import contextlib
import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator

os.environ.update(JAX_PLATFORMS="cpu", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", MOSAIC_GPU_DUMP_PTXAS="1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from kernels_pallas import causal_attention, gated_delta, packed_attention, paged_attention, top_k_top_p, tuning
from kernels_pallas.gated_delta import shapes
from kernels_pallas.gated_delta.shapes import CHANNELS, CONV, HEADS, WIDTH
from kernels_pallas.packed_attention.shapes import PHOTO
from kernels_pallas.paged_attention.shapes import PAGED
from kernels_pallas.top_k_top_p.shapes import VOCABULARY
from kernels_pallas.tune import TUNING_SPACES

TUNING_PROGRAMS = {  # the program that compiles a kernel's candidates
    "gated_delta_recurrent": "100 slots",
    "gated_delta_scan": "1 x 8,192",
    "gated_delta_scan_backward": "gradients of 1 x 8,192",
    "packed_attention": "1 photo",
    "packed_attention_backward": "1 photo, gradients",
    "paged_attention_decode": "decode 100 x 1,024",
}

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H200"
"""


def like(*shape: int, dtype: jnp.dtype = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def layer() -> gated_delta.Layer:
    return gated_delta.Layer(like(CHANNELS, CONV), like(HEADS), like(HEADS))


def state(slots: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return like(slots, HEADS, WIDTH, WIDTH, dtype=jnp.float32), like(slots, CONV - 1, CHANNELS)


def programs() -> Iterator[tuple[str, Callable, tuple, tuple[int, ...]]]:
    """Yields name, function, arguments, and the numbers of donated arguments."""
    integers = functools.partial(like, dtype=jnp.int32)
    for name, lengths in (("1 x 8,192", (8192,)), ("8 x 1,024", (1024,) * 8)):  # a block for half a head, and for a whole one
        tokens, S = sum(lengths), len(lengths)
        projected = like(tokens, CHANNELS), like(tokens, HEADS), like(tokens, HEADS)
        arguments = (*projected, layer(), *state(S), integers(S), integers(S), integers(1, 2))
        yield name, functools.partial(gated_delta.chunked, backend="hopper"), arguments, ()
    yield "gradients of 1 x 8,192", *gradients(8192)
    for shape in (shapes.RECURRENT[0], *shapes.RECURRENT[2:]):  # a cluster a head, a ring of heads a block
        B, T = shape.rows, shape.tokens
        projected = like(B, T, CHANNELS), like(B, T, HEADS), like(B, T, HEADS), like(B, T, HEADS, WIDTH)
        step = functools.partial(gated_delta.recurrent, eps=1e-6, backend="hopper")

        def run(qkv, a, b, z, layer, norm, recurrent_state, conv_state, slots, keep, step=step):
            return step(qkv, a, b, z, layer, norm, recurrent_state=recurrent_state, conv_state=conv_state, slots=slots, keep=keep)

        yield shape.name, run, (*projected, layer(), like(WIDTH), *state(B), integers(B), integers(B)), (6, 7)
    yield from attention()
    single, top_k = functools.partial(like, dtype=jnp.float32), like(128, dtype=jnp.int32)
    arguments = single(128, VOCABULARY), single(128), top_k, single(128)
    yield "top-k top-p of 128 rows", top_k_top_p.sampling_threshold, arguments, ()
    yield from training()


def gradients(tokens: int) -> tuple[Callable, tuple, tuple[int, ...]]:
    """Returns the gradients of one sequence's output with respect to all inputs."""
    integers = functools.partial(like, dtype=jnp.int32)
    projected = like(tokens, CHANNELS), like(tokens, HEADS), like(tokens, HEADS)

    def run(cotangent, starts, lengths, *inputs):
        forward = functools.partial(gated_delta.chunked, query_starts=starts, query_lens=lengths, backend="hopper")
        return jax.vjp(lambda *x: forward(*x).out, *inputs)[1](cotangent)

    return run, (like(tokens, HEADS, WIDTH), integers(1), integers(1), *projected, layer(), *state(1)), ()


def attention() -> Iterator[tuple[str, Callable, tuple, tuple[int, ...]]]:
    """Yields the attention programs."""
    integers = functools.partial(like, dtype=jnp.int32)
    for shape in (PAGED[1], PAGED[5]):
        S, T, pages = len(shape.query_lens), sum(shape.query_lens), max(shape.context_lens) // 64 + 1
        pool, numbers = like(4096, 64, 512), (integers(S), integers(S), integers(S))
        run = functools.partial(paged_attention.paged_attention, max_query_len=shape.max_query_len, backend="hopper")
        yield shape.name, run, (like(T, 8, 256), pool, pool, integers(S, pages), *numbers), ()
    patches, views = like(sum(PHOTO), 16, 72), (integers(len(PHOTO)), integers(len(PHOTO)))
    packed = functools.partial(packed_attention.packed_attention, longest=1088, backend="hopper")
    yield "1 photo", packed, (patches, patches, patches, *views), ()

    def gradients(q, k, v, cotangent, starts, lengths):
        return jax.vjp(lambda *qkv: packed(*qkv, starts, lengths), q, k, v)[1](cotangent)

    yield "1 photo, gradients", gradients, (patches,) * 4 + views, ()


def training() -> Iterator[tuple[str, Callable, tuple, tuple[int, ...]]]:
    """Yields the text layers' operations over packed rows of 4,096 tokens, and their gradients.

    No backend is named, so the kernels in ptxas's output are selected for the chip.
    """
    rows = 8, 4096
    segments = like(*rows, dtype=jnp.int32)

    def rule(qkv, a, b, layer, segments, cotangent):
        return jax.vjp(lambda *x: gated_delta.packed(*x, segments, WIDTH, WIDTH), qkv, a, b, layer)[1](cotangent)

    projected = like(*rows, CHANNELS), like(*rows, HEADS), like(*rows, HEADS)
    yield "packed delta rule, gradients", rule, (*projected, layer(), segments, like(*rows, HEADS, WIDTH)), ()

    def attend(q, k, v, segments, cotangent):
        return jax.vjp(lambda *x: causal_attention.causal_attention(*x, segments), q, k, v)[1](cotangent)

    queries, keys = like(*rows, 8, 256), like(*rows, 2, 256)
    yield "causal attention, gradients", attend, (queries, keys, keys, segments, queries), ()


def kernel_figures(output: str) -> dict[str, dict[str, int]]:
    """Returns registers and spilled bytes of each kernel from ptxas's output.

    Kernels of one name count with the largest figures.
    """
    kernel = r"Function properties for (\w+)_mosaic_gpu_kernel\s.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = {}
    for name, spilled, registers in sorted(re.findall(kernel, output, re.DOTALL)):
        before = found.get(name, {"registers": 0, "spilled bytes": 0})
        found[name] = {
            "registers": max(before["registers"], int(registers)),
            "spilled bytes": max(before["spilled bytes"], int(spilled)),
        }
    return found


@contextlib.contextmanager
def captured_stdout() -> Iterator[Callable[[], str]]:
    """Captures standard output of the process and its libraries inside the context.

    Yields a function that returns the captured text.
    """
    sys.stdout.flush()
    own = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield lambda: os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()
        finally:
            os.dup2(own, 1)
            os.close(own)


def compiled(function: Callable, arguments: tuple, donated: tuple[int, ...]) -> jax.stages.Compiled:
    """Compiles for one H200."""
    devices = topologies.get_topology_desc(platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=H200).devices
    with jax.set_mesh(Mesh(np.array(devices), ("chip",))):
        return jax.jit(function, donate_argnums=donated).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()


def candidates() -> None:
    """Compiles each kernel with every candidate; fails at one that does not fit the chip."""
    by_name = {name: program for name, *program in programs()}
    spaces = [space for space in TUNING_SPACES if space.backend == "hopper"]
    for space in spaces:
        for config in space.candidates:
            kernels = {other.kernel: [config if other is space else other.candidates[-1]] for other in spaces}
            with tuning.using({"hopper": {"any": kernels}}):
                jax.clear_caches()
                with captured_stdout():
                    compiled(*by_name[TUNING_PROGRAMS[space.kernel]])
            print(space.kernel, config, flush=True)


def main() -> None:
    found = {"jax": jax.__version__, "programs": {}}
    for name, *program in programs():
        with captured_stdout() as output:
            memory = compiled(*program).memory_analysis()
            kernels = kernel_figures(output())
        figures = {"temporary bytes": memory.temp_size_in_bytes, "donated bytes": memory.alias_size_in_bytes}
        found["programs"][name] = figures | kernels
    json.dump(found, sys.stdout, indent=2)


if __name__ == "__main__":
    candidates() if sys.argv[1:] == ["candidates"] else main()
