"""Compiled functions by key: compiled in parallel before serving starts, and stored for the next start."""

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
from serve.runtime import xla_autotune_cache
from serve.runtime.cache_dir import UntrustedCache, check_owner, make_private

log = logging.getLogger("serve")

THREADS = max(8, os.cpu_count() or 1)  # XLA releases the GIL while it compiles
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # jax's name for every compilation, cached on disk or not
CHECK_INTERVAL_S = 0.5  # between two calls of `check` during compilation
MAX_UNUSED_S = 30 * 24 * 3600  # unused folders are deleted after it: 170 MB for each version and size of the model
CHECKSUM_BYTES = hashlib.sha256().digest_size
SOURCE_PACKAGES = ("kernels_pallas", "minicpmv46_jax", "serve")  # their code decides the programs,
DATA_FILES = (tuning.FILE, xla_autotune_cache.BUNDLED_FILE)  # and these decide tile sizes and products


class ProgramStore:
    """Serialized executables on disk.

    Loading one skips tracing and lowering, which took most of a second start.

    Its files are unpickled and run, so a folder that another user may have written is not used. Each file
    begins with the sha256 of the rest, so a damaged one is never unpickled.

    Args:
      folder: has one subfolder for each set of sources, settings and device; created on the first save.
      depends: everything else that decides the programs, besides this project's code, jax and the device.
      options: XLA's options for functions that are not stored yet. They do not take part in the subfolder's
        name, because they decide how a function is compiled and not its meaning.
    """

    def __init__(self, folder: Path, *depends: Any, options: Mapping[str, str] | None = None):
        self.options = options
        device = jax.devices()[0]
        machine = device.device_kind, device.client.platform_version, *map(importlib.metadata.version, ("jax", "jaxlib"))
        flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
        settings = sorted((name, str(value)) for name, value in jax.config.values.items() if "cache" not in name)
        digest = hashlib.sha256(repr((machine, flags, settings, depends)).encode())
        top = Path(__file__).parents[2]
        code = (path for package in SOURCE_PACKAGES for path in (top / package).rglob("*.py"))
        for path in (*sorted(code), *DATA_FILES):
            digest.update(path.read_bytes())
        self._folder = folder / digest.hexdigest()[:16]
        try:
            check_owner(folder)
            self._trusted = True
            self._delete_unused(folder)
        except (UntrustedCache, OSError) as error:
            log.warning("stored programs are not used: %s", error)
            self._trusted = False

    def _delete_unused(self, folder: Path) -> None:
        """Marks this store's subfolder as used, and deletes those that were unused for long."""
        if self._folder.is_dir():
            os.utime(self._folder)
        for other in folder.iterdir() if folder.is_dir() else ():
            if time.time() - other.stat().st_mtime > MAX_UNUSED_S:
                shutil.rmtree(other, ignore_errors=True)

    def load(self, key: Hashable) -> Callable | None:
        """Returns the stored function of a key, or None if it is missing or cannot be loaded."""
        path = self._path(key)
        if not self._trusted:
            return None
        try:
            serialized, arguments, results = pickle.loads(_verified(path.read_bytes()))
            trees = jax.tree.structure(arguments), jax.tree.structure(results)
            return serialize_executable.deserialize_and_load(serialized, *trees, execution_devices=jax.devices()[:1])
        except FileNotFoundError:
            return None
        except Exception as error:  # written by a process that was killed, or refused by the device's driver
            log.warning("%s cannot be loaded and is compiled again: %s", path, error)
            return None

    def save(self, key: Hashable, compiled: jax.stages.Compiled) -> None:
        """Stores a function. A failure logs a warning, and the next start compiles the function again."""
        if not self._trusted:
            return
        try:
            serialized, *trees = serialize_executable.serialize(compiled)
            # Tree structures cannot be pickled, so trees of numbers with the same structures are.
            examples = [jax.tree.unflatten(tree, range(tree.num_leaves)) for tree in trees]
            make_private(self._folder)
            with tempfile.TemporaryDirectory(dir=self._folder) as temporary:
                written = Path(temporary, "program")
                written.touch(mode=0o600)
                data = pickle.dumps((serialized, *examples))
                written.write_bytes(hashlib.sha256(data).digest() + data)
                os.replace(written, self._path(key))
        except (
            ValueError,
            NotImplementedError,
            jax.errors.JaxRuntimeError,
            OSError,
        ) as error:  # OSError: disk full, read-only
            log.warning("%s is not stored: %s", key, error)

    def _path(self, key: Hashable) -> Path:
        return self._folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.program"


def _verified(content: bytes) -> memoryview:
    """Returns a stored file's data after its checksum. Raises ValueError if they do not match."""
    data = memoryview(content)[CHECKSUM_BYTES:]
    if hashlib.sha256(data).digest() != content[:CHECKSUM_BYTES]:
        raise ValueError("its checksum does not match")
    return data


class ProgramCache:
    """Compiled functions by key, backed by `store` if there is one. A missing key is a bug: KeyError."""

    def __init__(self, store: ProgramStore | None = None):
        self._store = store
        self._pending: dict[Hashable, Callable[[], Any]] = {}
        self._group_of: dict[Hashable, Hashable] = {}
        self._compiled: dict[Hashable, Any] = {}

    def add(
        self,
        key: Hashable,
        function: Callable,
        *arguments: Any,
        donate: tuple[int, ...] = (),
        autotune_group: Hashable = None,
    ) -> None:
        """Registers a function to be compiled for arguments of these shapes.

        Args:
          key: the name under which the compiled function is looked up.
          function: the function to jit.
          *arguments: arrays or shapes.
          donate: indices of the donated arguments.
          autotune_group: functions of one group multiply matrices of the same shapes. The first is compiled
            before the others, so that XLA's autotuner times each product once. None makes a group of one.
        """
        self._pending[key] = functools.partial(jax.jit(function, donate_argnums=donate).lower, *arguments)
        self._group_of[key] = key if autotune_group is None else autotune_group

    def compile(self, show: bool, check: Callable[[], None] = lambda: None) -> None:
        """Loads or compiles all added functions: one is traced while earlier ones are compiled.

        Args:
          show: whether to draw a progress bar on a terminal.
          check: called regularly; an error that it raises ends the call at once and abandons running
            compilations.
        """
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="compile")
        try:
            with tqdm(
                total=len(self._pending), desc="compiling", unit="program", disable=None if show else True, leave=False
            ) as bar:
                self._compile(pool, bar, check)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self._pending.clear()

    def _compile(self, pool: ThreadPoolExecutor, bar: tqdm, check: Callable[[], None]) -> None:
        stored = {} if self._store is None else dict(zip(self._pending, pool.map(self._store.load, self._pending), strict=True))
        self._compiled |= {key: program for key, program in stored.items() if program is not None}
        bar.update(len(self._pending) - len(missing := [key for key in self._pending if key not in self._compiled]))
        leaders = {self._group_of[key]: key for key in reversed(missing)}
        futures: dict[Hashable, Future] = {}
        with shared_lowering():
            for key in sorted(missing, key=lambda key: leaders[self._group_of[key]] != key):  # the leaders of groups first
                check()
                leader = futures.get(leaders[self._group_of[key]])
                futures[key] = pool.submit(self._compile_and_store, key, self._pending[key](), leader)
                futures[key].add_done_callback(lambda _: bar.update())
        waiting = set(futures.values())
        while waiting:
            check()
            done, waiting = wait(waiting, CHECK_INTERVAL_S, FIRST_EXCEPTION)
            for future in done:
                future.result()
        self._compiled |= {key: future.result() for key, future in futures.items()}

    def _compile_and_store(self, key: Hashable, lowered: jax.stages.Lowered, leader: Future | None) -> jax.stages.Compiled:
        if leader is not None:
            wait([leader])  # no deadlock: it was submitted first, so it is running or done
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
    """A count of all compilations in this process since the counter was made."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        self.count += event == COMPILE_EVENT
