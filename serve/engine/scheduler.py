"""What the next step does: which prompts are read, which answers go on, who waits. No jax, no tensors, no clock.

A request waits, is read, is decoded, and ends. To be read it needs a slot and pages for its whole prompt; while it is decoded it
takes a page more every 64 tokens. When pages run out, first the prefix cache gives up what nobody uses, then the request that
came last is put back: it is read again later, its answer so far included, and goes on where it was.

Nobody starves: requests are ranked once, by arrival; a unit of priority is worth PATIENCE_S seconds of it. The first in rank is
never put back, and every request fits into the pages alone, so the first ends, and then there is another first.

The scheduler plans ahead of the device: it counts a step's tokens when it plans it. That an answer has ended earlier is told by
`end`, one step late; nothing is lost but the rows of that step.
"""

import bisect
import dataclasses
import enum
import itertools
import math
from collections.abc import Sequence

import numpy as np

from serve.engine.host_prefix_cache import Copy, HostPrefixCache
from serve.engine.page_pool import PAGE, PagePool, SlotPool, pages_of
from serve.engine.prefix_cache import NOTHING, Hit, Node, PrefixCache

PATIENCE_S = 10.0  # of arrival that a unit of priority is worth


class Stage(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    READING = "reading"
    DECODING = "decoding"
    ENDED = "ended"


@dataclasses.dataclass(eq=False)
class Request:
    """A request as the scheduler knows it.

    Attributes:
      prompt: tokens of its prompt.
      most: tokens that prompt and answer may have together.
      keys: of the prompt's whole pages, for the prefix cache.
      priority: higher goes first.
      arrived, deadline: on the caller's clock; one that has not begun by its deadline expires.
      readable: tokens that may be read now; the caller raises it as pictures become ready.
      known: tokens of its answer that the caller has; the caller counts them.
      constrained: its caller chooses each token: it is held after every step, until `go_on`.
    """

    prompt: int
    most: int
    keys: Sequence[bytes] = ()
    priority: int = 0
    arrived: float = 0.0
    deadline: float = math.inf
    readable: float = math.inf
    known: int = 0
    constrained: bool = False

    # The scheduler's own.
    stage: Stage = Stage.WAITING
    rank: tuple[float, int] = (0.0, 0)
    begun: bool = False
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    read: int = 0
    hit: Hit = NOTHING
    boundaries: tuple[int, ...] = ()  # tokens after which to keep a snapshot

    @property
    def total(self) -> int:
        """Tokens to read before it can be decoded: the prompt, and after an interruption the answer so far."""
        return self.prompt + self.known


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """Tokens `start` to `start + count` of a request, to be read. Its memory begins as that of slot `source` (-1: empty).

    `snapshots`: (chunks, slot): its memory after so many chunks of 64 of this piece goes to that slot too. `last`: its answer
    starts with this piece.
    """

    request: Request
    start: int
    count: int
    source: int
    snapshots: tuple[tuple[int, int], ...]
    last: bool


@dataclasses.dataclass(frozen=True)
class SchedulerOutput:
    """A step. `rows` get `steps` tokens each, after row i was given page `grown[i, 1]` (-1: none) at place `grown[i, 0]`.

    Rows that are `held` get theirs later, from the caller, who then has them `go_on`.
    """

    pieces: list[PrefillChunk]
    rows: list[Request]
    slots: np.ndarray
    grown: np.ndarray
    held: np.ndarray
    steps: int
    preempted: list[Request]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to run."""
        return not self.pieces and not self.rows


@dataclasses.dataclass(frozen=True)
class Restore:
    """To be put back before anything is read: the copy's memory into `slot`, its pages from `first` on into `pages`."""

    copy: Copy
    slot: int
    first: int
    pages: list[int]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of a step: tokens and prompts read, and tokens decoded at once where nobody waits for less (`steps`)."""

    tokens: int
    prompts: int
    steps: int


class Scheduler:
    """All requests of an engine. Not for several threads at once."""

    def __init__(
        self,
        limits: Limits,
        pages: PagePool,
        slots: SlotPool,
        cache: PrefixCache | None = None,
        host: HostPrefixCache | None = None,
    ):
        assert limits.tokens % PAGE == 0 and limits.steps <= PAGE
        self.limits, self.pages, self.slots, self.cache, self.host = limits, pages, slots, cache, host
        self.waiting: list[Request] = []
        self.reading: list[Request] = []
        self.restores: list[Restore] = []  # the caller does and clears them between `admit` and `plan`
        self.preemptions = self.cached_tokens = self.restored_tokens = self.prompt_tokens = 0
        self._fresh: list[Node] = []  # whose snapshots the newest plan makes
        self._started = False  # whether answers begin with the newest plan
        self._count = itertools.count()
        self._at: list[Request | None] = [None] * slots.count
        self._decoding, self._constrained, self._held = np.zeros((3, slots.count), bool)
        self._length, self._most, self._paged = np.zeros((3, slots.count), np.int64)  # tokens in the state, most - 1, pages

    @property
    def running(self) -> int:
        """Requests being decoded."""
        return int(self._decoding.sum())

    def add(self, request: Request) -> None:
        """A new request. It must fit alone."""
        assert request.prompt < request.most <= self.pages.count * PAGE
        request.rank = (request.arrived - PATIENCE_S * request.priority, next(self._count))
        self._wait(request)

    def end(self, request: Request) -> None:
        """It is over, wherever it was; once or more often."""
        if request.stage is Stage.WAITING:
            self.waiting.remove(request)
        elif request.stage is not Stage.ENDED:
            self._release(request)
        request.stage = Stage.ENDED

    def put_back(self, request: Request) -> None:
        """It waits again, for its state is lost or its place is needed."""
        self._release(request)
        self._wait(request)

    def go_on(self, request: Request) -> None:
        """A held request has been given its token."""
        self._held[request.slot] = False

    def admit(self, now: float) -> list[Request]:
        """Lets those in that fit, in order of rank; the plan before has been sent. Returns who has waited past its deadline."""
        for node in self._fresh:
            node.pins -= 1
        self._fresh.clear()
        expired = [request for request in self.waiting if request.deadline < now and not request.begun]
        for request in expired:
            self.end(request)
        self._admit()
        return expired

    def plan(self) -> SchedulerOutput:
        """The next step; what it says is done."""
        # One step too behind prompts that ended in the plan before: their first tokens are told once this one has been sent.
        one = self.reading or self._started or self._constrained.any()
        steps = 1 if one else self.limits.steps
        grown, preempted = self._grow(steps)
        slots = self._decodable()
        self._length[slots] = np.minimum(self._length[slots] + steps, self._most[slots])
        pages = np.array([grown.get(slot, (0, -1)) for slot in slots.tolist()], np.int32).reshape(-1, 2)
        rows, held = [self._at[slot] for slot in slots], self._constrained[slots]
        self._held[slots] = held
        pieces = self._pieces()
        self._started = any(piece.last for piece in pieces)
        return SchedulerOutput(pieces, rows, slots.astype(np.int32), pages, held, steps, preempted)

    def _admit(self) -> None:
        """From waiting to being read, in order of rank, as long as slots and pages last."""
        while self.waiting and self.slots.free:
            request = self.waiting[0]
            hit = self._find(request)
            self.pages.share(hit.pages)  # before anything is evicted to make room
            need = pages_of(request.total) - hit.blocks
            reserve = self.slots.count - self.slots.free  # a page for each of the others, so that it is not put back at once
            if not self._available(need + reserve):
                self._drop(hit)
                return
            self.waiting.pop(0)
            self._begin(request, hit, [*hit.pages, *self.pages.take(need)])

    def _find(self, request: Request) -> Hit:
        if self.cache is None:
            return NOTHING
        hit = self.cache.find(request.keys[: (request.total - 1) // PAGE])  # one token must be left to read
        if hit.node is not None:
            hit.node.pins += 1
        return hit

    def _drop(self, hit: Hit) -> None:
        self.pages.give_back(hit.pages)
        if hit.node is not None:
            hit.node.pins -= 1

    def _begin(self, request: Request, hit: Hit, pages: list[int]) -> None:
        request.stage, request.begun, request.hit, request.pages = Stage.READING, True, hit, pages
        request.slot = self.slots.take()
        self._restore(request)
        request.read = request.hit.blocks * PAGE
        request.boundaries = self._boundaries(request)
        self._at[request.slot] = request
        self.reading.append(request)
        self.prompt_tokens += request.total
        self.cached_tokens += request.read

    def _restore(self, request: Request) -> None:
        """Has a longer beginning than the device knows put back from host memory, if there is one."""
        hit, keys = request.hit, request.keys[: (request.total - 1) // PAGE]
        blocks = 0 if self.host is None else self.host.longest(keys, hit.blocks)
        if not blocks:
            return
        copy = self.host.get(keys[blocks - 1])  # now: making room below may send another to the host, and this one away
        node = self.cache.add(keys[:blocks], request.pages[:blocks])
        if node is None:
            return
        if hit.node is not None:
            hit.node.pins -= 1
        request.hit = Hit(node, blocks, (), max(hit.alike, blocks))
        self.restores.append(Restore(copy, node.snapshot, hit.blocks, request.pages[hit.blocks : blocks]))
        self.restored_tokens += (blocks - hit.blocks) * PAGE

    def _boundaries(self, request: Request) -> tuple[int, ...]:
        """Where its prompt leaves what earlier ones had in common with it, and its last page: the next turn starts there."""
        if self.cache is None:
            return ()
        wanted = {request.hit.alike, len(request.keys)}
        return tuple(sorted(blocks * PAGE for blocks in wanted if blocks > request.hit.blocks))

    def _grow(self, steps: int) -> tuple[dict[int, tuple[int, int]], list[Request]]:
        """A page for every row that needs one: {slot: (place, page)}, and who was put back for it."""
        grown, preempted = {}, []
        slots = self._decodable()
        after = np.minimum(self._length[slots] + steps, self._most[slots])
        short = slots[pages_of(after) > self._paged[slots]]
        for request in sorted((self._at[slot] for slot in short), key=lambda request: request.rank):
            while request.stage is Stage.DECODING and not self._available(1):
                victim = max((other for other in self._at if other is not None), key=lambda other: other.rank)
                self.put_back(victim)
                preempted.append(victim)
            if request.stage is Stage.DECODING:
                (page,) = self.pages.take(1)
                grown[request.slot] = (len(request.pages), page)
                request.pages.append(page)
                self._paged[request.slot] += 1
        self.preemptions += len(preempted)
        return grown, preempted

    def _pieces(self) -> list[PrefillChunk]:
        """Shares the budget: the first in rank has half of it for sure, the others, shortest first, have what it leaves."""
        if not self.reading:
            return []
        first = min(self.reading, key=lambda request: request.rank)
        others = sorted((r for r in self.reading if r is not first), key=lambda request: request.total - request.read)
        budget = self.limits.tokens
        mine = min(self._next_end(first, budget) - first.read, budget // 2 // PAGE * PAGE)
        counts = {}
        for request in others[: self.limits.prompts - 1]:
            counts[request] = self._next_end(request, budget - mine - sum(counts.values())) - request.read
        counts[first] = self._next_end(first, budget - sum(counts.values())) - first.read
        return [self._piece(request, count) for request, count in counts.items() if count]

    def _next_end(self, request: Request, budget: int) -> int:
        """How far it can be read with so many tokens: to its end, or to the end of a page."""
        end = min(request.total, request.readable, request.read + budget)
        return request.total if end == request.total else max(int(end) // PAGE * PAGE, request.read)

    def _piece(self, request: Request, count: int) -> PrefillChunk:
        start, request.read = request.read, request.read + count
        hit, request.hit = request.hit, request.hit._replace(node=None)
        source = request.slot if start else -1
        if hit.node is not None:
            source = hit.node.snapshot
            hit.node.pins -= 1
        last = request.read == request.total
        if last:
            self._decode(request)
        return PrefillChunk(request, start, count, source, self._snapshots(request, start), last)

    def _snapshots(self, request: Request, start: int) -> tuple[tuple[int, int], ...]:
        wanted = (end // PAGE for end in request.boundaries if start < end <= request.read)
        nodes = [(blocks, self.cache.add(request.keys[:blocks], request.pages[:blocks])) for blocks in wanted]
        made = [(blocks, node) for blocks, node in nodes if node is not None]
        self._fresh += [node for _, node in made]
        return tuple((blocks - start // PAGE, node.snapshot) for blocks, node in made)

    def _decode(self, request: Request) -> None:
        self.reading.remove(request)
        request.stage = Stage.DECODING
        slot = request.slot
        self._decoding[slot], self._constrained[slot] = True, request.constrained
        self._length[slot], self._most[slot], self._paged[slot] = request.total, request.most - 1, len(request.pages)

    def _decodable(self) -> np.ndarray:
        """Slots of the rows that may get a token now."""
        return np.flatnonzero(self._decoding & ~self._held & (self._length < self._most))

    def _available(self, pages: int) -> bool:
        return self.pages.free >= pages or (self.cache is not None and self.cache.reclaim(pages))

    def _wait(self, request: Request) -> None:
        request.stage = Stage.WAITING
        bisect.insort(self.waiting, request, key=lambda other: other.rank)

    def _release(self, request: Request) -> None:
        """Gives back all it holds."""
        if request.stage is Stage.READING:
            self.reading.remove(request)
        if request.hit.node is not None:
            request.hit.node.pins -= 1
        self.pages.give_back(request.pages)
        self.slots.give_back(request.slot)
        self._at[request.slot] = None
        for which in (self._decoding, self._constrained, self._held):
            which[request.slot] = False
        request.slot, request.pages, request.read, request.hit = -1, [], 0, NOTHING
