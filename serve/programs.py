"""Compiled functions by name and shape: all made at the start, side by side, and none later."""

import functools
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from tqdm import tqdm

THREADS = 8  # XLA compiles outside of the GIL
COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's name for every compilation, cached on disk or not


class Programs:
    """A table of compiled functions. One that is missing is a fault of ours: KeyError."""

    def __init__(self):
        self._added: dict[Hashable, Callable[[], Any]] = {}
        self._compiled: dict[Hashable, Any] = {}

    def add(self, key: Hashable, function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> None:
        """A function, to be compiled for arguments of these shapes."""
        self._added[key] = functools.partial(jax.jit(function, donate_argnums=donate).lower, *arguments)

    def compile(self, show: bool) -> None:
        """Compiles what was added, with a bar on a terminal: one program is traced while the ones before are compiled."""
        bar = tqdm(total=len(self._added), desc="compiling", unit="program", disable=None if show else True, leave=False)
        with bar, ThreadPoolExecutor(THREADS) as pool:
            jobs = {}
            for key, lower in self._added.items():
                jobs[key] = pool.submit(lower().compile)
                jobs[key].add_done_callback(lambda _: bar.update())
            self._compiled |= {key: job.result() for key, job in jobs.items()}
        self._added.clear()

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
