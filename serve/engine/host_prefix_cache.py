"""The prefix cache's second tier: prefixes whose snapshot had to leave the device, as whole copies in host memory. No jax.

A copy has the memory after its last page and all its pages of keys and values, so that each stands for itself: it is found by its
last page's key alone, and the least recently used goes when the bytes run out.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol


class Copy(Protocol):
    """What the device gave, and takes back."""

    nbytes: int


class HostPrefixCache:
    """Copies of at most `size` bytes in all."""

    def __init__(self, size: int):
        self.size = size
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.used = 0
        self._copies: OrderedDict[bytes, Copy] = OrderedDict()

    def longest(self, keys: Sequence[bytes], least: int) -> int:
        """How many pages of a prompt with these keys the longest copy has, if more than `least`; else 0."""
        return next((n for n in range(len(keys), least, -1) if keys[n - 1] in self._copies), 0)

    def get(self, key: bytes) -> Copy:
        """The copy of a prefix that is there."""
        self._copies.move_to_end(key)
        return self._copies[key]

    def put(self, key: bytes, copy: Copy) -> None:
        """Keeps a copy, if it is not larger than everything."""
        if key in self._copies or copy.nbytes > self.size:
            return
        self._copies[key] = copy
        self.used += copy.nbytes
        while self.used > self.size:
            self.used -= self._copies.popitem(last=False)[1].nbytes
