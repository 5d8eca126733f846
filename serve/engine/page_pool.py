"""Who holds which page of keys and values, and which slot of memory. No jax: these are numbers.

A page may have several holders: the requests that share a prefix, and the prefix cache. It is free once nobody holds it.
"""

from collections.abc import Iterable

PAGE = 64  # tokens; that of `kernels_pallas.paged_attention`, held equal by a test


class PagePool:
    """Pages 0 to `count` - 1."""

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, number: int) -> list[int]:
        """So many pages with one holder each; the caller has made sure that they are free."""
        assert number <= len(self._free), f"{number} pages wanted, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(number)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of these, which are held."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One holder less."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def holders(self, page: int) -> int:
        """How many hold it."""
        return self._holders[page]


class SlotPool:
    """Slots `first` to `first + count - 1`, each with one holder or none."""

    def __init__(self, count: int, first: int = 0):
        self.count = count
        self._free = list(range(first + count - 1, first - 1, -1))

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A slot; the caller has made sure that there is one."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """It is free again."""
        assert slot not in self._free, f"slot {slot} is free"
        self._free.append(slot)


def pages_of(tokens):
    """Pages that hold so many tokens; a number or an array of them."""
    return -(-tokens // PAGE)
