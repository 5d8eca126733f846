"""Compiled functions by name and shape: all made at the start, side by side, and none later; kept on disk for the next start."""

import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from tqdm import tqdm

log = logging.getLogger("serve")

THREADS = max(8, os.cpu_count() or 1)  # XLA compiles outside of the GIL
COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's name for every compilation, cached on disk or not
SOURCES = ("kernels_pallas", "minicpmv46_jax", "serve")  # whose code decides what is compiled


class Store:
    """Compiled functions on disk, whole: they are neither traced nor lowered again, which took most of a second start.

    What is on disk is run: the folder must be the user's own.

    Args:
      folder: made if need be.
      depends: all that, beside this project's code, jax and the device, decides what is compiled.
    """

    def __init__(self, folder: Path, *depends: Any):
        device = jax.devices()[0]
        machine = device.device_kind, device.client.platform_version, *map(importlib.metadata.version, ("jax", "jaxlib"))
        flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
        settings = sorted((name, str(value)) for name, value in jax.config.values.items() if "cache" not in name)
        said = hashlib.sha256(repr((machine, flags, settings, depends)).encode())
        top = Path(__file__).parent.parent
        for path in sorted(path for source in SOURCES for path in (top / source).rglob("*.py")):
            said.update(path.read_bytes())
        self._folder = folder / said.hexdigest()[:16]

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
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            log.warning("%s is not kept: %s", key, error)
            return
        # Trees of numbers stand for their structures, which cannot be pickled themselves.
        examples = [jax.tree.unflatten(tree, range(tree.num_leaves)) for tree in trees]
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as beside:
            pickle.dump((serialized, *examples), beside)
        os.replace(beside.name, self._path(key))

    def _path(self, key: Hashable) -> Path:
        return self._folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.pickle"


class Programs:
    """A table of compiled functions, kept in `store` if there is one. One that is missing is a fault of ours: KeyError."""

    def __init__(self, store: Store | None = None):
        self._store = store
        self._added: dict[Hashable, Callable[[], Any]] = {}
        self._compiled: dict[Hashable, Any] = {}

    def add(self, key: Hashable, function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> None:
        """A function, to be compiled for arguments of these shapes."""
        self._added[key] = functools.partial(jax.jit(function, donate_argnums=donate).lower, *arguments)

    def compile(self, show: bool) -> None:
        """Loads or compiles what was added, with a bar on a terminal: one is traced while the ones before are compiled."""
        bar = tqdm(total=len(self._added), desc="compiling", unit="program", disable=None if show else True, leave=False)
        with bar, ThreadPoolExecutor(THREADS) as pool:
            kept = {} if self._store is None else dict(zip(self._added, pool.map(self._store.load, self._added), strict=True))
            jobs = {}
            for key, lower in self._added.items():
                if kept.get(key) is None:
                    jobs[key] = pool.submit(self._finish, key, lower())
                    jobs[key].add_done_callback(lambda _: bar.update())
                else:
                    self._compiled[key] = kept[key]
                    bar.update()
            self._compiled |= {key: job.result() for key, job in jobs.items()}
        self._added.clear()

    def _finish(self, key: Hashable, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        compiled = lowered.compile()
        if self._store is not None:
            self._store.save(key, compiled)
        return compiled

    def __getitem__(self, key: Hashable) -> Callable:
        return self._compiled[key]

    def __len__(self) -> int:
        return len(self._compiled)


class Compilations:
    """Counts what jax compiles in this process from now on, whoever asked for it."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        self.count += event == COMPILED
