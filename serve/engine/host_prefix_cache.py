"""Second tier of the prefix cache: copies in host memory of prefixes evicted from the device. Imports no jax.

A copy holds all pages of a prefix and the state after its last page, so it depends on no other copy. It is
found by the block hash of its last page. The least recently used copies are evicted when the bytes run out.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class HostPrefix(Protocol):
    """A prefix's copy, made and read by the model runner."""

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        ...


class HostPrefixCache:
    """Least-recently-used cache of prefix copies of at most `capacity` bytes in all."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.clear()

    def clear(self) -> None:
        """Drops all copies."""
        self.used_bytes = 0
        self._prefixes: OrderedDict[bytes, HostPrefix] = OrderedDict()

    def longest_match(self, block_hashes: Sequence[bytes], longer_than: int) -> int:
        """Returns the pages of the prompt's longest cached prefix; 0 if there are `longer_than` or fewer."""
        return next((n for n in range(len(block_hashes), longer_than, -1) if block_hashes[n - 1] in self._prefixes), 0)

    def get(self, block_hash: bytes) -> HostPrefix:
        """Returns a cached prefix."""
        self._prefixes.move_to_end(block_hash)
        return self._prefixes[block_hash]

    def put(self, block_hash: bytes, prefix: HostPrefix) -> None:
        """Adds a prefix, unless it is cached already or larger than the whole cache."""
        if block_hash in self._prefixes or prefix.nbytes > self.capacity:
            return
        self._prefixes[block_hash] = prefix
        self.used_bytes += prefix.nbytes
        while self.used_bytes > self.capacity:
            self.used_bytes -= self._prefixes.popitem(last=False)[1].nbytes
