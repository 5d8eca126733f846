"""Which rows of the device's bank hold which picture's features. No jax: these are numbers.

A picture is encoded once and stays until its rows are needed: then the least recently used goes that no request is about to read.
Rows are taken one by one, wherever they are free: the tower's output is scattered to them and a prompt gathers them back.
"""

from collections import OrderedDict

import numpy as np


class Entry:
    """A picture's features. `pins` counts the requests that are about to read them."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows
        self.pins = 0


class EncoderCache:
    """The bank's `rows` rows."""

    def __init__(self, rows: int):
        self.rows = rows
        self.hits = self.misses = 0
        self.clear()

    @property
    def used(self) -> int:
        """Rows that hold features."""
        return self.rows - self._count

    def clear(self) -> None:
        """Forgets everything."""
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._free = np.arange(self.rows, dtype=np.int32)  # the first `_count` are free
        self._count = self.rows

    def find(self, key: bytes) -> Entry | None:
        """A picture's features, pinned."""
        if (entry := self._entries.get(key)) is None:
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        entry.pins += 1
        return entry

    def reserve(self, key: bytes, rows: int) -> Entry | None:
        """Rows for a new picture, pinned; None while too many others are pinned."""
        while self._count < rows:
            victim = next((key for key, entry in self._entries.items() if not entry.pins), None)
            if victim is None:
                return None
            self._release(self._entries.pop(victim).rows)
        self._count -= rows
        self.misses += 1
        entry = self._entries[key] = Entry(self._free[self._count : self._count + rows].copy())
        entry.pins = 1
        return entry

    def unpin(self, entry: Entry) -> None:
        """One reader less."""
        assert entry.pins > 0
        entry.pins -= 1

    def _release(self, rows: np.ndarray) -> None:
        self._free[self._count : self._count + len(rows)] = rows
        self._count += len(rows)
