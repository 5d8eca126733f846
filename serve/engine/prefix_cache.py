"""Beginnings of prompts whose state is kept: a tree over pages of tokens, with memories at some of its nodes. No jax.

A prompt's pages are named by chained keys (`serve.keys`): a key stands for its 64 tokens, their pictures, and all before them.
Keys and values can be taken up at any page; the gated-delta memory only where a snapshot of it was made, which costs as much as
1,536 tokens of keys and values. So the tree holds the paths to snapshots and nothing else. Each snapshot is evicted alone, the
least recently used first; with it go the pages that lead to no other.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from serve.engine.page_pool import PagePool, SlotPool


class Node:
    """A page of some prompt: of its children none may be known without it."""

    def __init__(self, key: bytes, parent: "Node | None", page: int):
        self.key, self.parent, self.page = key, parent, page
        self.children = 0
        self.snapshot: int | None = None  # the slot of the memory after this page
        self.pins = 0  # requests that are about to start from the snapshot, and the plan that makes it

    def path(self) -> "list[Node]":
        """From the first page to this one."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]


class Hit(NamedTuple):
    """What is known of a prompt: `blocks` pages may be taken over, with the memory of `node`; `alike` pages were met before."""

    node: Node | None
    blocks: int
    pages: tuple[int, ...]
    alike: int


NOTHING = Hit(None, 0, (), 0)


class PrefixCache:
    """Snapshots in `slots`, paths to them in `pages`; `leaving` is told of a snapshot just before it is evicted."""

    def __init__(self, pages: PagePool, slots: SlotPool, leaving: Callable[[Node], None] | None = None):
        self._pages, self._slots, self._leaving = pages, slots, leaving
        self._nodes: dict[bytes, Node] = {}
        self._recent: OrderedDict[Node, None] = OrderedDict()  # nodes with a snapshot, least recently used first

    @property
    def snapshots(self) -> int:
        """Snapshots held."""
        return len(self._recent)

    def find(self, keys: Sequence[bytes]) -> Hit:
        """The longest beginning that a prompt with these keys may start from."""
        path: list[Node] = []
        for key in keys:
            if key not in self._nodes:
                break
            path.append(self._nodes[key])
        blocks = next((n for n in range(len(path), 0, -1) if path[n - 1].snapshot is not None), 0)
        if not blocks:
            return Hit(None, 0, (), len(path))
        self._recent.move_to_end(path[blocks - 1])
        return Hit(path[blocks - 1], blocks, tuple(node.page for node in path[:blocks]), len(path))

    def add(self, keys: Sequence[bytes], pages: Sequence[int]) -> Node | None:
        """Makes room for the snapshot after these pages.

        Returns:
          Its node, pinned; None if it is there already, or every other is pinned. Whoever asked unpins it once the program that
          writes it has been sent: until then its slot must not be given to another.
        """
        known = self._nodes.get(keys[-1])
        if known is not None and known.snapshot is not None:
            self._recent.move_to_end(known)
            return None
        if not self._slots.free and not self._evict(lambda node: True):
            return None
        node = None
        for key, page in zip(keys, pages, strict=True):
            node = self._nodes.get(key) or self._grow(key, node, page)
        node.snapshot = self._slots.take()
        node.pins += 1
        self._recent[node] = None
        return node

    def reclaim(self, pages: int) -> bool:
        """Evicts until so many pages are free. False if that cannot be."""
        while self._pages.free < pages:
            if not self._evict(lambda node: not node.children and self._pages.holders(node.page) == 1):
                return False
        return True

    def clear(self) -> None:
        """Forgets everything, telling nobody."""
        for node in self._recent:
            self._slots.give_back(node.snapshot)
        self._pages.give_back(node.page for node in self._nodes.values())
        self._nodes.clear()
        self._recent.clear()

    def _grow(self, key: bytes, parent: Node | None, page: int) -> Node:
        self._pages.share([page])
        if parent is not None:
            parent.children += 1
        self._nodes[key] = node = Node(key, parent, page)
        return node

    def _evict(self, fits: Callable[[Node], bool]) -> bool:
        """The least recently used snapshot that fits and that nobody is about to read."""
        victim = next((node for node in self._recent if not node.pins and fits(node)), None)
        if victim is None:
            return False
        if self._leaving is not None:
            self._leaving(victim)
        del self._recent[victim]
        self._slots.give_back(victim.snapshot)
        victim.snapshot = None
        self._prune(victim)
        return True

    def _prune(self, node: Node | None) -> None:
        """Cuts the pages off that lead to no snapshot any more."""
        while node is not None and not node.children and node.snapshot is None:
            del self._nodes[node.key]
            self._pages.give_back([node.page])
            if node.parent is not None:
                node.parent.children -= 1
            node = node.parent
