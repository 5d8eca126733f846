"""Schedules steps: chooses the prompts to prefill and the requests that decode or wait. Imports no jax.

A request waits, is prefilled, decodes, and finishes. Prefill needs a slot and pages for the whole prompt;
decode takes one more page every 64 tokens. When pages run out, the prefix cache evicts unused prefixes first.
Then the lowest-ranked request is preempted: it waits, and later prefills its prompt and its output so far
again. A smaller rank goes first.

Requests are ranked once, by arrival time; a unit of priority counts as PRIORITY_S seconds. The highest-ranked
request is never preempted and always fits into the pages alone, so every request finishes.

The scheduler counts a step's tokens when it schedules the step. `finish` arrives one step after the last
token, so the request's row of that step is computed in vain.
"""

import bisect
import dataclasses
import enum
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np

from kernels_pallas.page_size import PAGE
from serve.engine.host_prefix_cache import HostPrefix, HostPrefixCache
from serve.engine.page_pool import PagePool, SlotPool, num_pages
from serve.engine.prefix_cache import NO_HIT, Node, PrefixCache, PrefixHit

PRIORITY_S = 10.0  # of arrival time per unit of priority


class Stage(enum.Enum):
    """Stages of a request."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False)
class Request:
    """The scheduler's record of a request.

    Attributes:
      num_prompt_tokens: tokens of the prompt.
      max_total_tokens: tokens that prompt and output may have together.
      block_hashes: of the prompt's whole pages, for the prefix cache.
      priority: higher goes first.
      arrival_time, deadline: on the caller's clock; a request that has not started by its deadline expires.
      num_ready_tokens: tokens that may be prefilled now; the caller raises it as images are encoded.
      num_output_tokens: output tokens that the caller has received; counted by the caller.
      uses_grammar: the row awaits a grammar mask after every step, until `mark_sampled`.
    """

    num_prompt_tokens: int
    max_total_tokens: int
    block_hashes: Sequence[bytes] = ()
    priority: int = 0
    arrival_time: float = 0.0
    deadline: float = math.inf
    num_ready_tokens: float = math.inf
    num_output_tokens: int = 0
    uses_grammar: bool = False

    # Set by the scheduler.
    stage: Stage = Stage.WAITING
    rank: tuple[float, int] = (0.0, 0)
    started: bool = False
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    num_computed_tokens: int = 0
    prefix_hit: PrefixHit = NO_HIT
    snapshot_ends: tuple[int, ...] = ()  # numbers of tokens after which to take a snapshot

    @property
    def num_tokens(self) -> int:
        """Tokens to prefill before decode: the prompt, and after a preemption the output so far."""
        return self.num_prompt_tokens + self.num_output_tokens

    def forget_resources(self) -> None:
        """Forgets slot, pages and prefix, which the scheduler has freed."""
        self.slot, self.pages, self.num_computed_tokens, self.prefix_hit = -1, [], 0, NO_HIT


R = TypeVar("R", bound=Request)


@dataclasses.dataclass(frozen=True)
class PrefillChunk(Generic[R]):
    """Tokens `start` to `start + num_tokens` of a request, to be prefilled.

    Attributes:
      request, start, num_tokens: the chunk.
      source_slot: slot of the state it starts from; -1 for an empty state.
      snapshots: (n, slot): the state after n pages of this chunk is also written to that slot.
      is_last: the chunk completes the prefill.
    """

    request: R
    start: int
    num_tokens: int
    source_slot: int
    snapshots: tuple[tuple[int, int], ...]
    is_last: bool


@dataclasses.dataclass(frozen=True)
class SchedulerOutput(Generic[R]):
    """A step.

    Attributes:
      prefill_chunks: chunks to prefill, in one call.
      rows: requests that decode `num_steps` tokens each, after the prefill.
      slots: int32 [rows].
      new_pages: int32 [rows, 2]: (index in the block table, page) that a row is given first; page -1 for
        none.
      awaiting_mask: bool [rows]: the row's logits are held until the caller samples them and calls
        `mark_sampled`.
      num_steps: decode steps.
      preempted: requests that were preempted for this step.
    """

    prefill_chunks: list[PrefillChunk[R]]
    rows: list[R]
    slots: np.ndarray
    new_pages: np.ndarray
    awaiting_mask: np.ndarray
    num_steps: int
    preempted: list[R]

    @property
    def is_empty(self) -> bool:
        """True if the step runs nothing."""
        return not self.prefill_chunks and not self.rows


@dataclasses.dataclass(frozen=True)
class Restore:
    """A prefix to copy back to the device before the next prefill.

    Attributes:
      prefix: the copy in host memory.
      snapshot_slot: where its state goes.
      first_page: number of the first page to copy; the device has those before it.
      pages: where its pages go.
    """

    prefix: HostPrefix
    snapshot_slot: int
    first_page: int
    pages: list[int]


@dataclasses.dataclass(frozen=True)
class StepLimits:
    """Limits of a step: prefilled tokens and prompts, and decode steps while no request waits for a shorter
    dispatch.
    """

    max_tokens: int
    max_prompts: int
    max_decode_steps: int


class Scheduler(Generic[R]):
    """All requests of an engine. Not thread-safe."""

    def __init__(
        self,
        limits: StepLimits,
        pages: PagePool,
        slots: SlotPool,
        prefix_cache: PrefixCache | None = None,
        host_cache: HostPrefixCache | None = None,
    ):
        assert limits.max_tokens % PAGE == 0 and limits.max_decode_steps <= PAGE
        self.limits, self.pages, self.slots = limits, pages, slots
        self.prefix_cache, self.host_cache = prefix_cache, host_cache
        self.preemptions = self.cached_tokens = self.restored_tokens = self.prompt_tokens = 0
        self._arrivals = itertools.count()
        self.reset(())

    def reset(self, requests: Iterable[R]) -> None:
        """Frees all slots and pages and drops all prefixes, in whatever state an error has left them.

        These requests wait, with their output so far; all others are forgotten.
        """
        self.pages.clear()
        self.slots.clear()
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
        if self.host_cache is not None:
            self.host_cache.clear()
        self.waiting: list[R] = []
        self.prefilling: list[R] = []
        # The request that `admit` or `schedule` works on; after an error in them, the one at fault, if any.
        self.current: R | None = None
        self.restores: list[Restore] = []  # run and cleared by the caller between `admit` and `schedule`
        self._new_snapshots: list[Node] = []  # written by the newest step
        self._samples_first_tokens = False  # the newest step completes a prefill
        self._by_slot: list[R | None] = [None] * self.slots.count
        self._decoding, self._uses_grammar, self._awaiting_mask = np.zeros((3, self.slots.count), bool)
        # Tokens in the state, their largest number (max_total_tokens - 1), and pages, of each decoding slot.
        self._num_tokens, self._max_tokens, self._num_pages = np.zeros((3, self.slots.count), np.int64)
        for request in requests:
            request.forget_resources()
            self._wait(request)

    @property
    def num_decoding(self) -> int:
        """Number of decoding requests."""
        return int(self._decoding.sum())

    def add(self, request: R) -> None:
        """Adds a new request, which must fit into the pages alone."""
        assert request.num_prompt_tokens < request.max_total_tokens <= self.pages.count * PAGE
        request.rank = (request.arrival_time - PRIORITY_S * request.priority, next(self._arrivals))
        self._wait(request)

    def finish(self, request: R) -> None:
        """Finishes a request in any stage and frees its slot and pages.

        Has no effect the second time, or if `add` failed.
        """
        if request.stage is Stage.WAITING:
            self.waiting = [other for other in self.waiting if other is not request]
        elif request.stage is not Stage.FINISHED:
            self._release(request)
        request.stage = Stage.FINISHED

    def preempt(self, request: R) -> None:
        """Frees a request's slot and pages and makes it wait again."""
        self._release(request)
        self._wait(request)

    def mark_sampled(self, request: R) -> None:
        """Lets a row that awaited a grammar mask take part in the next step: its token has been sampled."""
        self._awaiting_mask[request.slot] = False

    def admit(self, now: float) -> list[R]:
        """Starts waiting requests that fit, by rank; the programs of the step before have been sent.

        Returns:
          The requests that expired.
        """
        for node in self._new_snapshots:
            node.pins -= 1
        self._new_snapshots.clear()
        expired = [request for request in self.waiting if request.deadline < now and not request.started]
        for request in expired:
            self.finish(request)
        self._admit_waiting()
        return expired

    def schedule(self) -> SchedulerOutput[R]:
        """Returns the next step, which counts as done from then on."""
        # One decode step while prompts are prefilled, and also in the step after: the engine reads the first
        # tokens of the prompts only once that step has been sent.
        single = self.prefilling or self._samples_first_tokens or self._uses_grammar.any()
        num_steps = 1 if single else self.limits.max_decode_steps
        grown, preempted = self._allocate_new_pages(num_steps)
        slots = self._decodable_slots()
        self._num_tokens[slots] = np.minimum(self._num_tokens[slots] + num_steps, self._max_tokens[slots])
        new_pages = np.array([grown.get(slot, (0, -1)) for slot in slots.tolist()], np.int32).reshape(-1, 2)
        rows, awaiting_mask = [self._by_slot[slot] for slot in slots], self._uses_grammar[slots]
        self._awaiting_mask[slots] = awaiting_mask
        chunks = self._prefill_chunks()
        self._samples_first_tokens = any(chunk.is_last for chunk in chunks)
        return SchedulerOutput(chunks, rows, slots.astype(np.int32), new_pages, awaiting_mask, num_steps, preempted)

    def _admit_waiting(self) -> None:
        """Moves waiting requests to prefill, by rank, as long as slots and pages last."""
        while self.waiting and self.slots.num_free:
            request = self.current = self.waiting[0]
            hit = self._find_prefix(request)
            self.pages.incref(hit.pages)  # before room is made, so that they are not evicted
            need = num_pages(request.num_tokens) - hit.num_blocks
            reserve = self.slots.count - self.slots.num_free  # a page for each running request, to avoid an early preemption
            if not self._make_room(need + reserve):
                self._drop_hit(hit)
                break
            self.waiting.pop(0)
            self._start_prefill(request, hit, [*hit.pages, *self.pages.allocate(need)])
        self.current = None

    def _find_prefix(self, request: R) -> PrefixHit:
        if self.prefix_cache is None:
            return NO_HIT
        hit = self.prefix_cache.find(self._reusable_hashes(request))
        if hit.node is not None:
            hit.node.pins += 1
        return hit

    def _reusable_hashes(self, request: R) -> Sequence[bytes]:
        return request.block_hashes[: (request.num_tokens - 1) // PAGE]  # one token at least must be prefilled

    def _drop_hit(self, hit: PrefixHit) -> None:
        self.pages.free(hit.pages)
        if hit.node is not None:
            hit.node.pins -= 1

    def _start_prefill(self, request: R, hit: PrefixHit, pages: list[int]) -> None:
        request.stage, request.started, request.prefix_hit, request.pages = Stage.PREFILL, True, hit, pages
        request.slot = self.slots.allocate()
        self._plan_restore(request)
        request.num_computed_tokens = request.prefix_hit.num_blocks * PAGE
        request.snapshot_ends = self._snapshot_ends(request)
        self._by_slot[request.slot] = request
        self.prefilling.append(request)
        self.prompt_tokens += request.num_tokens
        self.cached_tokens += request.num_computed_tokens

    def _plan_restore(self, request: R) -> None:
        """Adds a restore if host memory has a longer prefix than the device."""
        hit, hashes = request.prefix_hit, self._reusable_hashes(request)
        num_blocks = 0 if self.host_cache is None else self.host_cache.longest_match(hashes, hit.num_blocks)
        if not num_blocks:
            return
        assert self.host_cache is not None and self.prefix_cache is not None  # a host cache extends a prefix cache
        # Fetched before `add`, because the eviction in it may change the host cache.
        prefix = self.host_cache.get(hashes[num_blocks - 1])
        node = self.prefix_cache.add(hashes[:num_blocks], request.pages[:num_blocks])
        if node is None:
            return
        if hit.node is not None:
            hit.node.pins -= 1
        request.prefix_hit = PrefixHit(node, num_blocks, (), max(hit.num_known_blocks, num_blocks))
        self.restores.append(Restore(prefix, node.snapshot_slot, hit.num_blocks, request.pages[hit.num_blocks : num_blocks]))
        self.restored_tokens += (num_blocks - hit.num_blocks) * PAGE

    def _snapshot_ends(self, request: R) -> tuple[int, ...]:
        """Returns where to take snapshots: where the prompt leaves the known prefix, and after its last whole
        page before its last token.

        The next turn of a conversation starts from the second one, and so does the same prompt again, which
        must prefill one token at least.
        """
        if self.prefix_cache is None:
            return ()
        hit = request.prefix_hit
        ends = {hit.num_known_blocks, (request.num_prompt_tokens - 1) // PAGE}
        return tuple(sorted(num_blocks * PAGE for num_blocks in ends if num_blocks > hit.num_blocks))

    def _allocate_new_pages(self, num_steps: int) -> tuple[dict[int, tuple[int, int]], list[R]]:
        """Allocates a page for every row that needs one.

        Returns:
          {slot: (index in the block table, page)}, and the requests preempted to make room.
        """
        grown, preempted = {}, []
        slots = self._decodable_slots()
        after = np.minimum(self._num_tokens[slots] + num_steps, self._max_tokens[slots])
        short = slots[num_pages(after) > self._num_pages[slots]]
        for request in sorted((self._by_slot[slot] for slot in short), key=lambda request: request.rank):
            self.current = request
            while request.stage is Stage.DECODE and not self._make_room(1):
                victim = max((other for other in self._by_slot if other is not None), key=lambda other: other.rank)
                self.preempt(victim)
                preempted.append(victim)
            if request.stage is Stage.DECODE:
                (page,) = self.pages.allocate(1)
                grown[request.slot] = (len(request.pages), page)
                request.pages.append(page)
                self._num_pages[request.slot] += 1
        self.current = None
        self.preemptions += len(preempted)
        return grown, preempted

    def _prefill_chunks(self) -> list[PrefillChunk[R]]:
        """Divides the token budget: half of it is reserved for the highest-ranked request; the shortest
        others come first.
        """
        if not self.prefilling:
            return []
        first = min(self.prefilling, key=lambda request: request.rank)
        others = [request for request in self.prefilling if request is not first]
        others.sort(key=lambda request: request.num_tokens - request.num_computed_tokens)
        budget = self.limits.max_tokens
        reserved = min(self._chunk_end(first, budget) - first.num_computed_tokens, budget // 2 // PAGE * PAGE)
        counts = {}
        for request in others[: self.limits.max_prompts - 1]:
            left = budget - reserved - sum(counts.values())
            counts[request] = self._chunk_end(request, left) - request.num_computed_tokens
        counts[first] = self._chunk_end(first, budget - sum(counts.values())) - first.num_computed_tokens
        chunks = []
        for request, count in counts.items():
            if count:
                self.current = request
                chunks.append(self._prefill_chunk(request, count))
        self.current = None
        return chunks

    def _chunk_end(self, request: R, budget: int) -> int:
        """Returns where a chunk of at most `budget` tokens ends: the end of the prompt, or of a page."""
        end = min(request.num_tokens, request.num_ready_tokens, request.num_computed_tokens + budget)
        return request.num_tokens if end == request.num_tokens else max(int(end) // PAGE * PAGE, request.num_computed_tokens)

    def _prefill_chunk(self, request: R, count: int) -> PrefillChunk[R]:
        start, request.num_computed_tokens = request.num_computed_tokens, request.num_computed_tokens + count
        hit, request.prefix_hit = request.prefix_hit, request.prefix_hit._replace(node=None)
        source_slot = request.slot if start else -1
        if hit.node is not None:
            source_slot = hit.node.snapshot_slot
            hit.node.pins -= 1
        is_last = request.num_computed_tokens == request.num_tokens
        if is_last:
            self._start_decode(request)
        return PrefillChunk(request, start, count, source_slot, self._take_snapshots(request, start), is_last)

    def _take_snapshots(self, request: R, start: int) -> tuple[tuple[int, int], ...]:
        if self.prefix_cache is None:
            return ()
        snapshots = []
        for blocks in (end // PAGE for end in request.snapshot_ends if start < end <= request.num_computed_tokens):
            node = self.prefix_cache.add(request.block_hashes[:blocks], request.pages[:blocks])
            if node is not None:
                assert node.snapshot_slot is not None  # `add` has reserved it
                self._new_snapshots.append(node)
                snapshots.append((blocks - start // PAGE, node.snapshot_slot))
        return tuple(snapshots)

    def _start_decode(self, request: R) -> None:
        self.prefilling.remove(request)
        request.stage = Stage.DECODE
        slot = request.slot
        self._decoding[slot], self._uses_grammar[slot] = True, request.uses_grammar
        self._num_tokens[slot], self._max_tokens[slot] = request.num_tokens, request.max_total_tokens - 1
        self._num_pages[slot] = len(request.pages)

    def _decodable_slots(self) -> np.ndarray:
        """Returns the slots of rows that may decode now."""
        return np.flatnonzero(self._decoding & ~self._awaiting_mask & (self._num_tokens < self._max_tokens))

    def _make_room(self, pages: int) -> bool:
        """Evicts prefixes until this number of pages is free; returns False if that is impossible."""
        return self.pages.num_free >= pages or (self.prefix_cache is not None and self.prefix_cache.evict_until_free(pages))

    def _wait(self, request: R) -> None:
        request.stage = Stage.WAITING
        bisect.insort(self.waiting, request, key=lambda other: other.rank)

    def _release(self, request: R) -> None:
        """Frees the slot, the pages and the pinned prefix of a request."""
        if request.stage is Stage.PREFILL:
            self.prefilling.remove(request)
        if request.prefix_hit.node is not None:
            request.prefix_hit.node.pins -= 1
        self.pages.free(request.pages)
        self.slots.free(request.slot)
        self._by_slot[request.slot] = None
        for flags in (self._decoding, self._uses_grammar, self._awaiting_mask):
            flags[request.slot] = False
        request.forget_resources()
