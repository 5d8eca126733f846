"""From flags to a model that answers: platform, caches, checkpoint, first compilation.

Nothing here is imported before the command line has been read, and jax is told its platform before it looks for devices.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from minicpmv46_jax import MiniCPMV
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.library import DTYPES, ModelLoader
from minicpmv46_jax.model import Params, parameter_shapes
from serve.engine.engine import Engine, QueuePolicy
from serve.engine.memory_plan import ACCELERATOR, CPU, GIB, MAX_RUNNING, MAX_RUNNING_CPU, EngineConfig, plan_memory, working_bytes
from serve.engine.model_runner import ModelRunner
from serve.engine.page_pool import PAGE
from serve.runtime import xla_autotune_cache as autotuned
from serve.runtime.program_cache import ProgramStore

MEMORY_FRACTION = 0.9  # of a device's memory
CPU_MEMORY = 2 * 2**30  # bytes for the state of conversations on a CPU, whose memory is others' too
DEMO_NAME = "minicpm-v-4.6-demo"
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # flags, and what jax calls them
_INSTALL = {name: f'; where there is one, pip install "minicpmv46-jax[{name}]"' for name in ("gpu", "tpu")}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an engine runs.

    Attributes:
      platform: "cpu", "gpu" or "tpu", of jax's first device.
      fraction: of that device's memory, to be taken.
      cache: the folder in which compiled programs outlast the process.
    """

    platform: str
    fraction: float
    cache: Path


def choose_platform(wanted: str | None, memory_fraction: float = MEMORY_FRACTION) -> str:
    """Starts jax on the platform of that flag, or on what jax finds; a GPU's memory is taken to that fraction at once.

    Returns:
      "cpu", "gpu" or "tpu".

    Raises:
      ValueError: there is no such device, or this installation of jax cannot use it.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(memory_fraction))  # the only way to tell XLA
    if wanted is not None:
        jax.config.update("jax_platforms", PLATFORMS[wanted])
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter from jax 0.10 where no plugin for the platform is installed
        if wanted is None:
            raise ValueError(f"jax finds no device: {' '.join(str(error).split())}") from None
        raise ValueError(_missing(wanted)) from None
    return jax.default_backend()


def _missing(wanted: str) -> str:
    jax.config.update("jax_platforms", None)
    try:
        found = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    except RuntimeError:
        found = "no device at all"
    return f"--{wanted}: jax finds no {wanted.upper()} here, it found: {found}{_INSTALL.get(wanted, '')}"


def keep_compilations(place: Place) -> None:
    """Has jax keep what it compiles for a CPU for the next start, unless the user has told jax a place of their own.

    For other devices the engine keeps its programs whole (`programs.ProgramStore`), and jax would keep each once more.
    """
    if place.platform == "cpu" and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(place.cache / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # 1.0 leaves out most of a small model's


def start(loading: ModelLoader, place: Place, wishes: EngineConfig, policy: QueuePolicy) -> tuple[MiniCPMV, Engine]:
    """A checkpoint on the device, and an engine over it: its steps are compiled while its parameters are loaded.

    Args:
      loading: what is served, its dtype given.
      place: where.
      wishes: how much, clamped to what fits.
      policy: of the engine's queue.

    Raises ValueError for what is wrong with the checkpoint, or if the device has no room for it.
    """
    source, dtype = loading.source, loading.dtype
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, DTYPES[dtype]), parameter_shapes(loading.config))
    memory = free_memory(place)
    if place.platform != "cpu":
        needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        if needed >= memory:
            sizes = f"{needed / GIB:.2f} GiB in {dtype}, and {jax.devices()[0]} has {memory / GIB:.2f} GiB free"
            raise ValueError(f"the parameters of {source} take {sizes}; bfloat16 needs half of float32")
        memory -= needed
    device = _device(loading.config, shapes, place, memory, wishes)
    with step(f"loading {source} in {dtype}, compiling (kept for the next start)") as told, _fitting():
        device.compile(show=True, check=loading.check)
        told("compiled")
        model = loading.model()
        device.load(jax.block_until_ready(model.params))
    return model, Engine(model, device, policy)


def make_engine(model: MiniCPMV, place: Place, wishes: EngineConfig, policy: QueuePolicy) -> Engine:
    """An engine over a model that is loaded, every step compiled or found on disk. Raises ValueError as `start`."""
    device = _device(model.config, model.params, place, free_memory(place), wishes)
    with step("compiling (kept for the next start)"), _fitting():
        device.compile(show=True)
        device.load(model.params)
    return Engine(model, device, policy)


def _device(config: ModelConfig, shapes: Params, place: Place, memory: int, wishes: EngineConfig) -> ModelRunner:
    """Steps of the size that fits into so many bytes beside the parameters."""
    cpu = place.platform == "cpu"
    buckets, default = (CPU, MAX_RUNNING_CPU) if cpu else (ACCELERATOR, MAX_RUNNING)
    itemsize = shapes["text"]["embed"]["weight"].dtype.itemsize
    memory -= 0 if cpu else working_bytes(config.vision, buckets)
    sizes, lines = plan_memory(config.text, itemsize, memory, wishes, buckets, default)
    print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
    print(
        f"room for {sizes.running} answers at once, {sizes.pages * PAGE} tokens of context in all, {sizes.longest} in one, "
        f"{sizes.snapshots} prefixes, features of {sizes.features} picture tokens",
        file=sys.stderr,
    )
    return ModelRunner(config, shapes, sizes, store=None if cpu else _store(place, config, sizes, itemsize))


def _store(place: Place, *depends: Any) -> ProgramStore:
    """Not for a CPU: what was compiled for one may be run on another with fewer instructions, and home folders are shared."""
    options = autotuned.compiler_options(place.cache / autotuned.FOLDER) if place.platform == "gpu" else None
    return ProgramStore(place.cache / "programs", *depends, options=options)


def free_memory(place: Place) -> int:
    """Bytes for parameters to come and the state of conversations: the device's memory, to that fraction, less what is in use.

    On a CPU CPU_MEMORY, for state alone.
    """
    statistics = jax.devices()[0].memory_stats()
    if place.platform == "cpu" or statistics is None:
        return CPU_MEMORY
    whole = statistics["bytes_limit"]  # on a GPU the fraction that XLA was given, see `choose_platform`
    return int(whole if place.platform == "gpu" else whole * place.fraction) - statistics["bytes_in_use"]


@contextlib.contextmanager
def _fitting() -> Iterator[None]:
    """A model too large for the device is the user's to solve, in one line; any other fault of jax is not."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        where = jax.devices()[0]
        raise ValueError(f"the model does not fit in the free memory of {where}; bfloat16 needs half of float32") from error


@contextlib.contextmanager
def step(what: str) -> Iterator[Callable[[str], None]]:
    """Says what goes on, and how long it took; the function given says after how long some part was done."""
    print(f"{what} ...", end=" ", file=sys.stderr, flush=True)
    start, parts = time.monotonic(), []
    try:
        yield lambda part: parts.append(f" ({part} after {time.monotonic() - start:.1f})")
    except BaseException:
        print(file=sys.stderr, flush=True)  # the error gets a line of its own
        raise
    print(f"{time.monotonic() - start:.1f} s{''.join(parts)}", file=sys.stderr, flush=True)
