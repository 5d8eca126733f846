"""Starts jax on a platform, loads a checkpoint and compiles the engine's programs.

The command line imports this module only after it has read its arguments, so jax gets its platform before it
looks for devices.
"""

import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from kernels_pallas import backends
from kernels_pallas.page_size import PAGE
from minicpmv46_jax import MiniCPMV
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.library import DTYPES, ModelLoader
from minicpmv46_jax.model import Params, parameter_shapes
from serve.engine.engine import Engine, QueuePolicy
from serve.engine.memory_plan import ACCELERATOR, CPU, GIB, MAX_RUNNING, MAX_RUNNING_CPU, EngineConfig, plan_memory, working_bytes
from serve.engine.model_runner import ModelRunner
from serve.runtime import xla_autotune_cache
from serve.runtime.cache_dir import UntrustedCache, check_owner, make_private
from serve.runtime.program_cache import ProgramStore

log = logging.getLogger("serve")

MEMORY_FRACTION = 0.9  # of a device's memory
CPU_STATE_BYTES = 2 * 2**30  # for the state of requests on a CPU, because other programs use its memory too
DEMO_NAME = "minicpm-v-4.6-demo"
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # flags, and jax's names for them
_INSTALL_HINTS = {name: f'; where there is one, pip install "minicpmv46-jax[{name}]"' for name in ("gpu", "tpu")}


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
    """The device that an engine runs on.

    Attributes:
      platform: "cpu", "gpu" or "tpu", of jax's first device.
      memory_fraction: share of that device's memory to use.
      cache_folder: the folder in which compiled programs outlast the process.
      backend: kernels to run: "reference", "hopper", "tpu", or None for the fastest that serves the model.
    """

    platform: str
    memory_fraction: float
    cache_folder: Path
    backend: str | None = None


def choose_platform(platform: str | None, memory_fraction: float = MEMORY_FRACTION) -> str:
    """Starts jax on a platform, or on the one that jax finds. A GPU's share of memory is reserved at once.

    Returns:
      "cpu", "gpu" or "tpu".

    Raises:
      ValueError: there is no such device, or this installation of jax cannot use it.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(memory_fraction))  # XLA reads it from nowhere else
    if platform is not None:
        jax.config.update("jax_platforms", PLATFORMS[platform])
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: jax 0.10 where the platform's plugin is not installed
        if platform is None:
            raise ValueError(f"jax finds no device: {' '.join(str(error).split())}") from None
        raise ValueError(_missing_platform(platform)) from None
    return jax.default_backend()


def _missing_platform(platform: str) -> str:
    jax.config.update("jax_platforms", None)
    try:
        found = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    except RuntimeError:
        found = "no device at all"
    return f"--{platform}: jax finds no {platform.upper()} here, it found: {found}{_INSTALL_HINTS.get(platform, '')}"


def check_backend(backend: str | None) -> None:
    """Raises ValueError if a kernel backend does not exist, or cannot run on jax's first device."""
    reasons = {backends.REFERENCE: None, backends.HOPPER: backends.mosaic_unsupported_reason(), backends.TPU: None}
    stand_ins = {name: backends.Implementation(check_backend, reason) for name, reason in reasons.items()}
    try:
        backends.dispatch(backend, stand_ins)  # only its checks matter: no operation runs here
    except NotImplementedError as error:
        raise ValueError(str(error)) from None


def enable_compilation_cache(device_config: DeviceConfig) -> None:
    """Turns on jax's own compilation cache on a CPU, unless the user has configured one.

    On other devices `program_cache.ProgramStore` stores whole programs, and jax would store each a second
    time.
    """
    configured = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]  # defined at run time
    if device_config.platform == "cpu" and configured is None:
        folder = device_config.cache_folder / "jax"
        try:
            check_owner(folder)
        except UntrustedCache as error:
            log.warning("jax's compilation cache is not used: %s", error)
            return
        with contextlib.suppress(OSError):  # jax warns about a folder that it cannot write
            make_private(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # the default 1.0 skips most of a small model's


def load_engine(
    loader: ModelLoader, device_config: DeviceConfig, engine_config: EngineConfig, policy: QueuePolicy
) -> tuple[MiniCPMV, Engine]:
    """Loads a checkpoint onto the device and makes an engine over it.

    Programs are compiled while parameters are loaded.

    Args:
      loader: the checkpoint that is being read, its dtype given.
      device_config: the device.
      engine_config: the requested sizes, clamped to the device's memory.
      policy: limits of the engine's queue.

    Raises:
      ValueError: the checkpoint is damaged, or the device has too little memory for it.
    """
    source, dtype = loader.source, loader.dtype
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, DTYPES[dtype]), parameter_shapes(loader.config))
    memory = free_memory(device_config)
    if device_config.platform != "cpu":
        needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        if needed >= memory:
            sizes = f"{needed / GIB:.2f} GiB in {dtype}, and {jax.devices()[0]} has {memory / GIB:.2f} GiB free"
            raise ValueError(f"the parameters of {source} take {sizes}; bfloat16 needs half of float32")
        memory -= needed
    runner = _make_runner(loader.config, shapes, device_config, memory, engine_config)
    title = f"loading {source} in {dtype}, compiling (kept for the next start)"
    with timed(title) as add_part, _explain_compile_errors(device_config):
        runner.compile(show=True, check=loader.check)
        add_part("compiled")
        model = loader.model(device_config.backend)
        runner.load(jax.block_until_ready(model.params))
    return model, Engine(model, runner, policy)


def make_engine(model: MiniCPMV, device_config: DeviceConfig, engine_config: EngineConfig, policy: QueuePolicy) -> Engine:
    """Makes an engine over a loaded model, its programs compiled or read from disk.

    Raises ValueError if the device has too little memory.
    """
    runner = _make_runner(model.config, model.params, device_config, free_memory(device_config), engine_config)
    with timed("compiling (kept for the next start)"), _explain_compile_errors(device_config):
        runner.compile(show=True)
        runner.load(model.params)
    return Engine(model, runner, policy)


def _make_runner(
    config: ModelConfig, shapes: Params, device_config: DeviceConfig, memory: int, engine_config: EngineConfig
) -> ModelRunner:
    """Makes a model runner with sizes that fit into `memory` bytes, and prints the sizes."""
    cpu = device_config.platform == "cpu"
    buckets, default = (CPU, MAX_RUNNING_CPU) if cpu else (ACCELERATOR, MAX_RUNNING)
    itemsize = shapes["text"]["embed"]["weight"].dtype.itemsize
    memory -= 0 if cpu else working_bytes(config.vision, buckets)
    plan, lines = plan_memory(config.text, itemsize, memory, engine_config, buckets, default)
    print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
    print(
        f"room for {plan.max_running} running requests, {plan.num_pages * PAGE} tokens of context in all, "
        f"{plan.max_model_len} in one, {plan.num_snapshots} cached prefixes, features of {plan.encoder_cache_rows} image tokens",
        file=sys.stderr,
    )
    store = None if cpu else _program_store(device_config, config, plan, itemsize, device_config.backend)
    return ModelRunner(config, shapes, plan, device_config.backend, store)


def _program_store(device_config: DeviceConfig, *depends: Any) -> ProgramStore:
    """Returns a store for programs of a GPU or TPU.

    CPU programs are not stored: home folders are shared, and another CPU may lack instructions that a program
    uses.
    """
    autotune_folder = device_config.cache_folder / xla_autotune_cache.FOLDER
    options = xla_autotune_cache.compiler_options(autotune_folder) if device_config.platform == "gpu" else None
    return ProgramStore(device_config.cache_folder / "programs", *depends, options=options)


def free_memory(device_config: DeviceConfig) -> int:
    """Returns the bytes that are free for parameters and request state within the device's share of memory.

    On a CPU it returns CPU_STATE_BYTES, for request state alone.
    """
    statistics = jax.devices()[0].memory_stats()
    if device_config.platform == "cpu" or statistics is None:
        return CPU_STATE_BYTES
    limit = statistics["bytes_limit"]  # on a GPU already the fraction that `choose_platform` gave to XLA
    return int(limit if device_config.platform == "gpu" else limit * device_config.memory_fraction) - statistics["bytes_in_use"]


@contextlib.contextmanager
def _explain_compile_errors(device_config: DeviceConfig) -> Iterator[None]:
    """Raises ValueError of one line if memory runs out or the requested backend does not serve the model."""
    try:
        yield
    except NotImplementedError as error:
        if device_config.backend is None:
            raise
        raise ValueError(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        device = jax.devices()[0]
        raise ValueError(f"the model does not fit in the free memory of {device}; bfloat16 needs half of float32") from error


@contextlib.contextmanager
def timed(title: str) -> Iterator[Callable[[str], None]]:
    """Prints a title and then the seconds that the block took.

    The function that it yields adds the time at which a part was done.
    """
    print(f"{title} ...", end=" ", file=sys.stderr, flush=True)
    start, parts = time.monotonic(), []
    try:
        yield lambda part: parts.append(f" ({part} after {time.monotonic() - start:.1f})")
    except BaseException:
        print(file=sys.stderr, flush=True)  # the error gets a line of its own
        raise
    print(f"{time.monotonic() - start:.1f} s{''.join(parts)}", file=sys.stderr, flush=True)
