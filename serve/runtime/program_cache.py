"""Compiled functions by name and shape: all made at the start, side by side, and none later; kept on disk for the next start."""

import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from tqdm import tqdm

from kernels_pallas import tuning
from kernels_pallas.gpu.export_cache import shared_lowering
from serve.runtime import xla_autotune_cache as autotuned

log = logging.getLogger("serve")

THREADS = max(8, os.cpu_count() or 1)  # XLA compiles outside of the GIL
COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's name for every compilation, cached on disk or not
CHECK_S = 0.5  # how often somebody else's mistake is looked for while programs are compiled
FORGOTTEN_S = 30 * 24 * 3600  # after which what no start has used is deleted: 170 MB for each version and size of the model
SOURCES = ("kernels_pallas", "minicpmv46_jax", "serve")  # whose code decides what is compiled,
DATA = (tuning.FILE, autotuned.FILE)  # and how kernels are cut and products computed


class ProgramStore:
    """Compiled functions on disk, whole: they are neither traced nor lowered again, which took most of a second start.

    What is on disk is run: the folder must be the user's own.

    Args:
      folder: made if need be.
      depends: all that, beside this project's code, jax and the device, decides what is compiled.
      options: XLA's, for what is not there yet and is compiled; they say how, and not what.
    """

    def __init__(self, folder: Path, *depends: Any, options: Mapping[str, str] | None = None):
        self.options = options
        device = jax.devices()[0]
        machine = device.device_kind, device.client.platform_version, *map(importlib.metadata.version, ("jax", "jaxlib"))
        flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
        settings = sorted((name, str(value)) for name, value in jax.config.values.items() if "cache" not in name)
        said = hashlib.sha256(repr((machine, flags, settings, depends)).encode())
        top = Path(__file__).parents[2]
        code = (path for source in SOURCES for path in (top / source).rglob("*.py"))
        for path in (*sorted(code), *DATA):
            said.update(path.read_bytes())
        self._folder = folder / said.hexdigest()[:16]
        if self._folder.is_dir():
            os.utime(self._folder)  # used today
        for other in folder.iterdir() if folder.is_dir() else ():
            if time.time() - other.stat().st_mtime > FORGOTTEN_S:
                shutil.rmtree(other, ignore_errors=True)

    def load(self, key: Hashable) -> Callable | None:
        """A function of that name, or None; one that cannot be read is made anew."""
        path = self._path(key)
        try:
            serialized, arguments, results = pickle.loads(path.read_bytes())
            trees = jax.tree.structure(arguments), jax.tree.structure(results)
            return serialize_executable.deserialize_and_load(serialized, *trees, execution_devices=jax.devices()[:1])
        except FileNotFoundError:
            return None
        except Exception as error:  # written by a process that was killed, or refused by the device's driver
            log.warning("%s cannot be used and is made anew: %s", path, error)
            return None

    def save(self, key: Hashable, compiled: jax.stages.Compiled) -> None:
        """Keeps a function; one that cannot be kept is compiled again next time."""
        try:
            serialized, *trees = serialize_executable.serialize(compiled)
            # Trees of numbers stand for their structures, which cannot be pickled themselves.
            examples = [jax.tree.unflatten(tree, range(tree.num_leaves)) for tree in trees]
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder) as beside:
                written = Path(beside, "program")
                written.write_bytes(pickle.dumps((serialized, *examples)))
                os.replace(written, self._path(key))
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError, OSError) as error:  # the last: no room, no right
            log.warning("%s is not kept: %s", key, error)

    def _path(self, key: Hashable) -> Path:
        return self._folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.pickle"


class ProgramCache:
    """A table of compiled functions, kept in `store` if there is one. One that is missing is a fault of ours: KeyError."""

    def __init__(self, store: ProgramStore | None = None):
        self._store = store
        self._added: dict[Hashable, Callable[[], Any]] = {}
        self._group_of: dict[Hashable, Hashable] = {}
        self._compiled: dict[Hashable, Any] = {}

    def add(
        self, key: Hashable, function: Callable, *arguments: Any, donate: tuple[int, ...] = (), autotune_group: Hashable = None
    ) -> None:
        """A function, to be compiled for arguments of these shapes.

        Those that are `alike` multiply matrices of the same shapes: the others are compiled behind the first, so that XLA's
        autotuner need not try the same for each of them at once.
        """
        self._added[key] = functools.partial(jax.jit(function, donate_argnums=donate).lower, *arguments)
        self._group_of[key] = key if autotune_group is None else autotune_group

    def compile(self, show: bool, check: Callable[[], None] = lambda: None) -> None:
        """Loads or compiles what was added, with a bar on a terminal: one is traced while the ones before are compiled.

        `check` is called now and then; what it raises ends it, and nobody waits for what is being compiled.
        """
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="compile")
        try:
            with tqdm(
                total=len(self._added), desc="compiling", unit="program", disable=None if show else True, leave=False
            ) as bar:
                self._compile(pool, bar, check)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self._added.clear()

    def _compile(self, pool: ThreadPoolExecutor, bar: tqdm, check: Callable[[], None]) -> None:
        kept = {} if self._store is None else dict(zip(self._added, pool.map(self._store.load, self._added), strict=True))
        self._compiled |= {key: program for key, program in kept.items() if program is not None}
        bar.update(len(self._added) - len(missing := [key for key in self._added if key not in self._compiled]))
        firsts = {self._group_of[key]: key for key in reversed(missing)}
        jobs: dict[Hashable, Future] = {}
        with shared_lowering():
            for key in sorted(missing, key=lambda key: firsts[self._group_of[key]] != key):  # the firsts first
                check()
                jobs[key] = pool.submit(self._finish, key, self._added[key](), jobs.get(firsts[self._group_of[key]]))
                jobs[key].add_done_callback(lambda _: bar.update())
        waiting = set(jobs.values())
        while waiting:
            check()
            done, waiting = wait(waiting, CHECK_S, FIRST_EXCEPTION)
            for job in done:
                job.result()
        self._compiled |= {key: job.result() for key, job in jobs.items()}

    def _finish(self, key: Hashable, lowered: jax.stages.Lowered, behind: Future | None) -> jax.stages.Compiled:
        if behind is not None:
            wait([behind])  # it was sent before, so it is under way or over
        if self._store is None:
            return lowered.compile()
        compiled = lowered.compile(self._store.options)
        self._store.save(key, compiled)
        return compiled

    def __getitem__(self, key: Hashable) -> Callable:
        return self._compiled[key]

    def __len__(self) -> int:
        return len(self._compiled)


class CompilationCounter:
    """Counts what jax compiles in this process from now on, whoever asked for it."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        self.count += event == COMPILED
