"""Placement of encoded image slices in the rows of the device's encoder cache. Imports no jax.

A slice is encoded once. It stays until its rows are needed; then the least recently used slice that no
request has pinned is evicted. Rows need not be contiguous: the vision tower's output is scattered to them,
and a prefill gathers them.
"""

from collections import OrderedDict

import numpy as np


class EncoderCacheEntry:
    """Rows of one encoded slice. `pins` counts the requests that have yet to prefill it."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows
        self.pins = 0


class EncoderCache:
    """Least-recently-used cache of encoded slices over `num_rows` rows, keyed by `mm_hash`."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self.hits = self.misses = 0
        self.clear()

    @property
    def num_used(self) -> int:
        """Rows in use."""
        return self.num_rows - self._num_free

    def clear(self) -> None:
        """Drops all entries."""
        self._entries: OrderedDict[bytes, EncoderCacheEntry] = OrderedDict()
        self._free = np.arange(self.num_rows, dtype=np.int32)  # the first `_num_free` are free
        self._num_free = self.num_rows

    def find(self, mm_hash: bytes) -> EncoderCacheEntry | None:
        """Returns the entry of a slice and pins it; None if it is not cached."""
        if (entry := self._entries.get(mm_hash)) is None:
            return None
        self.hits += 1
        self._entries.move_to_end(mm_hash)
        entry.pins += 1
        return entry

    def reserve(self, mm_hash: bytes, num_rows: int) -> EncoderCacheEntry | None:
        """Returns a new, pinned entry for a slice; None while pinned entries leave too few rows."""
        while self._num_free < num_rows:
            victim = next((key for key, entry in self._entries.items() if not entry.pins), None)
            if victim is None:
                return None
            self._free_rows(self._entries.pop(victim).rows)
        self._num_free -= num_rows
        self.misses += 1
        entry = self._entries[mm_hash] = EncoderCacheEntry(self._free[self._num_free : self._num_free + num_rows].copy())
        entry.pins = 1
        return entry

    def unpin(self, entry: EncoderCacheEntry) -> None:
        """Removes one pin."""
        assert entry.pins > 0
        entry.pins -= 1

    def _free_rows(self, rows: np.ndarray) -> None:
        self._free[self._num_free : self._num_free + len(rows)] = rows
        self._num_free += len(rows)
