"""Free lists of the pages of keys and values, and of the slots of recurrent and conv state. Imports no jax.

A page has a reference count: each request that uses it and the prefix cache hold one reference. A page
without references is free.
"""

from collections.abc import Iterable

from kernels_pallas.page_size import PAGE


class PagePool:
    """Pages 0 to `count` - 1."""

    def __init__(self, count: int):
        self.count = count
        self.clear()

    def clear(self) -> None:
        """Removes all references."""
        self._free = list(range(self.count - 1, -1, -1))
        self._ref_counts = [0] * self.count

    @property
    def num_free(self) -> int:
        """Pages without a reference."""
        return len(self._free)

    def allocate(self, number: int) -> list[int]:
        """Returns pages with one reference each; the caller has checked that enough are free."""
        assert number <= len(self._free), f"{number} pages wanted, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(number)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def incref(self, pages: Iterable[int]) -> None:
        """Adds a reference to each of these pages, which are in use."""
        for page in pages:
            assert self._ref_counts[page] > 0, f"page {page} is free"
            self._ref_counts[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Removes a reference from each of these pages; those without any become free."""
        for page in pages:
            assert self._ref_counts[page] > 0, f"page {page} is free"
            self._ref_counts[page] -= 1
            if not self._ref_counts[page]:
                self._free.append(page)

    def ref_count(self, page: int) -> int:
        """Returns the number of references to a page."""
        return self._ref_counts[page]


class SlotPool:
    """Slots `first` to `first + count - 1`, each free or allocated."""

    def __init__(self, count: int, first: int = 0):
        self.count, self._first = count, first
        self.clear()

    def clear(self) -> None:
        """Frees all slots."""
        self._free = list(range(self._first + self.count - 1, self._first - 1, -1))

    @property
    def num_free(self) -> int:
        """Slots that are not allocated."""
        return len(self._free)

    def allocate(self) -> int:
        """Returns a slot; the caller has checked that one is free."""
        return self._free.pop()

    def free(self, slot: int) -> None:
        """Frees a slot."""
        assert slot not in self._free, f"slot {slot} is free"
        self._free.append(slot)


def num_pages(tokens):
    """Returns the pages that hold this number of tokens; takes an int or an array."""
    return -(-tokens // PAGE)
