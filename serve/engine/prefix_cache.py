"""Prefix cache: a tree over pages of tokens, with snapshots of the recurrent and conv state at some nodes.

Imports no jax.

The pages of a prompt are identified by chained hashes (`serve.engine.request.block_hashes`). A hash stands
for the page's 64 tokens, their images, and everything before them. Keys and values can be reused from any
page on. The recurrent state can only be reused where a snapshot was taken, and a snapshot costs as much
memory as 1,536 tokens of keys and values. So the tree holds only paths that lead to a snapshot. Snapshots are
evicted one by one, the least recently used first, together with the pages that lead to no other snapshot.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from serve.engine.page_pool import PagePool, SlotPool


class Node:
    """A cached page.

    `pins` counts the requests about to start from its snapshot, and the step that writes the snapshot.
    """

    def __init__(self, block_hash: bytes, parent: "Node | None", page: int):
        self.block_hash, self.parent, self.page = block_hash, parent, page
        self.num_children = 0
        self.snapshot_slot: int | None = None  # slot of the state after this page
        self.pins = 0

    def path(self) -> "list[Node]":
        """Returns the nodes from the first page to this one."""
        nodes: list[Node] = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]


class PrefixHit(NamedTuple):
    """The cached part of a prompt.

    Attributes:
      node: the node whose snapshot the request starts from; None if no snapshot matches.
      num_blocks: pages up to that node.
      pages: these pages.
      num_known_blocks: pages that match the tree, with or without a snapshot behind them.
    """

    node: Node | None
    num_blocks: int
    pages: tuple[int, ...]
    num_known_blocks: int


NO_HIT = PrefixHit(None, 0, (), 0)


class EvictedPrefix(NamedTuple):
    """A prefix that has just been evicted.

    Attributes:
      block_hash: of its last page.
      pages: its pages, in order.
      snapshot_slot: slot of the state after them.
    """

    block_hash: bytes
    pages: tuple[int, ...]
    snapshot_slot: int


class PrefixCache:
    """Snapshots in `slots`, and paths to them in `pages`.

    Args:
      pages: of keys and values.
      slots: of snapshots.
      on_evict: called after an eviction, before the pages and the slot are allocated again.
    """

    def __init__(self, pages: PagePool, slots: SlotPool, on_evict: Callable[[EvictedPrefix], None] | None = None):
        self._pages, self._slots, self._on_evict = pages, slots, on_evict
        self.clear()

    def clear(self) -> None:
        """Drops everything and frees all slots; the caller clears the pages. Does not call `on_evict`."""
        self._slots.clear()
        self._nodes: dict[bytes, Node] = {}
        self._snapshots: OrderedDict[Node, None] = OrderedDict()  # nodes with a snapshot, least recently used first

    @property
    def num_snapshots(self) -> int:
        """Number of snapshots."""
        return len(self._snapshots)

    def find(self, block_hashes: Sequence[bytes]) -> PrefixHit:
        """Returns the longest prefix that a prompt with these block hashes may start from."""
        path: list[Node] = []
        for block_hash in block_hashes:
            if block_hash not in self._nodes:
                break
            path.append(self._nodes[block_hash])
        num_blocks = next((n for n in range(len(path), 0, -1) if path[n - 1].snapshot_slot is not None), 0)
        if not num_blocks:
            return PrefixHit(None, 0, (), len(path))
        self._snapshots.move_to_end(path[num_blocks - 1])
        return PrefixHit(path[num_blocks - 1], num_blocks, tuple(node.page for node in path[:num_blocks]), len(path))

    def add(self, block_hashes: Sequence[bytes], pages: Sequence[int]) -> Node | None:
        """Reserves a slot for the snapshot after these pages.

        Returns:
          Its node, pinned. None if the snapshot exists already, or every other snapshot is pinned. The caller
          unpins the node
          once the program that writes the snapshot has been sent: until then the slot must not be reused.
        """
        known = self._nodes.get(block_hashes[-1])
        if known is not None and known.snapshot_slot is not None:
            self._snapshots.move_to_end(known)
            return None
        if not self._slots.num_free and not self._evict(lambda node: True):
            return None
        node = None
        for block_hash, page in zip(block_hashes, pages, strict=True):
            node = self._nodes.get(block_hash) or self._add_node(block_hash, node, page)
        assert node is not None  # there is at least one page
        node.snapshot_slot = self._slots.allocate()
        node.pins += 1
        self._snapshots[node] = None
        return node

    def evict_until_free(self, num_pages: int) -> bool:
        """Evicts snapshots until this number of pages is free; returns False if that is impossible."""
        while self._pages.num_free < num_pages:
            if not self._evict(lambda node: not node.num_children and self._pages.ref_count(node.page) == 1):
                return False
        return True

    def _add_node(self, block_hash: bytes, parent: Node | None, page: int) -> Node:
        self._pages.incref([page])
        if parent is not None:
            parent.num_children += 1
        self._nodes[block_hash] = node = Node(block_hash, parent, page)
        return node

    def _evict(self, evictable: Callable[[Node], bool]) -> bool:
        """Evicts the least recently used snapshot that is evictable and not pinned; returns False if there is
        none.
        """
        victim = next((node for node in self._snapshots if not node.pins and evictable(node)), None)
        if victim is None:
            return False
        evicted = EvictedPrefix(victim.block_hash, tuple(node.page for node in victim.path()), victim.snapshot_slot)
        del self._snapshots[victim]
        self._slots.free(victim.snapshot_slot)
        victim.snapshot_slot = None
        self._prune(victim)
        if self._on_evict is not None:
            self._on_evict(evicted)  # last, so an error in it leaves the cache consistent
        return True

    def _prune(self, node: Node | None) -> None:
        """Removes the node and its ancestors as long as they lead to no snapshot."""
        while node is not None and not node.num_children and node.snapshot_slot is None:
            del self._nodes[node.block_hash]
            self._pages.free([node.page])
            if node.parent is not None:
                node.parent.num_children -= 1
            node = node.parent
