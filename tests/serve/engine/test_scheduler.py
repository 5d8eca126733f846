"""The scheduler against a device that can be checked by hand: its memory is the tokens themselves.

The next token of a sequence is a checksum of all tokens before it, so that any page, slot or snapshot that is not what it should
be shows as a wrong answer at once.
"""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_pallas.paged_attention
from serve.engine.host_prefix_cache import HostPrefixCache
from serve.engine.page_pool import PAGE, PagePool, SlotPool, pages_of
from serve.engine.prefix_cache import PrefixCache
from serve.engine.scheduler import PATIENCE_S, Limits, Request, Scheduler, Stage

VOCABULARY = 97
LIMITS = Limits(tokens=256, prompts=4, steps=4)


def next_token(tokens):
    return (31 * sum((i + 1) * token for i, token in enumerate(tokens)) + len(tokens)) % VOCABULARY


def alone(prompt, most, stop):
    """The answer: it ends with `stop`, or when prompt and answer have `most` tokens."""
    tokens = list(prompt)
    while len(tokens) < most:
        tokens.append(next_token(tokens))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]


@dataclasses.dataclass
class Chat:
    """A client's side of a request."""

    prompt: list[int]
    most: int
    stop: int
    arrives: int = 0
    leaves: float = math.inf
    late: int | None = None  # of a constrained one: steps that its mask takes
    ready: float = 0  # when its next mask is there
    request: Request | None = None
    answer: list[int] = dataclasses.field(default_factory=list)
    outcome: str | None = None

    @property
    def tokens(self):
        return self.prompt + self.answer

    def keys(self):
        return [repr(self.prompt[: PAGE * (i + 1)]).encode() for i in range(len(self.prompt) // PAGE)]


class ModelRunner:
    """Pages hold tokens; the memory of a slot is all tokens it has seen."""

    def __init__(self, pages, slots):
        self.pages = np.full((pages, PAGE), -1)
        self.memory = {}
        self.tables = {}
        self.left = {}
        self.last = {}
        self.held = set()
        self.slots = slots

    def run(self, plan, chats):
        """What each request got."""
        written = [slot for piece in plan.pieces for _, slot in piece.snapshots]
        assert len(set(written)) == len(written)
        out = [(chats[row.request], self.read(row, chats[row.request])) for row in plan.pieces]
        assert len({id(row) for row in plan.rows}) == len(plan.rows) == len(plan.slots)
        assert sum(piece.count for piece in plan.pieces) <= LIMITS.tokens and len(plan.pieces) <= LIMITS.prompts
        for slot, row, (place, page), held in zip(plan.slots, plan.rows, plan.grown, plan.held, strict=True):
            table = self.tables[slot]
            if page >= 0:
                assert place == len(table)
                table.append(page)
            assert held == (chats[row].late is not None) and (plan.steps == 1 or not held)
            out.append((chats[row], self.hold(slot) if held else [self.step(slot, chats[row]) for _ in range(plan.steps)]))
        return out

    def fetch(self, node):
        """A whole prefix: its memory and its pages, of which both must tell the same."""
        pages = [self.pages[page.page].copy() for page in node.path()]
        assert tuple(np.concatenate(pages).tolist()) == self.memory[node.snapshot]
        return SimpleNamespace(nbytes=len(pages), pages=pages, memory=self.memory[node.snapshot])

    def restore(self, restore):
        self.memory[restore.slot] = restore.copy.memory
        for page, values in zip(restore.pages, restore.copy.pages[restore.first :], strict=True):
            self.pages[page] = values

    def read(self, piece, chat):
        slot, end = piece.request.slot, piece.start + piece.count
        assert piece.start % PAGE == 0
        self.tables[slot] = list(piece.request.pages)
        memory = () if piece.source < 0 else self.memory[piece.source]
        assert memory == tuple(chat.tokens[: piece.start])
        for at in range(piece.start, end):
            self.write(slot, at, chat.tokens[at])
        self.memory[slot] = tuple(chat.tokens[:end])
        for chunks, kept in piece.snapshots:
            assert kept >= self.slots
            self.memory[kept] = tuple(chat.tokens[: piece.start + chunks * PAGE])
        self.held.discard(slot)
        if not piece.last:
            return []
        self.left[slot] = chat.most - end
        return [self.sample(slot, chat)]

    def step(self, slot, chat):
        if not self.left[slot]:
            return self.last[slot]
        self.write(slot, len(self.memory[slot]), self.last[slot])
        self.memory[slot] += (self.last[slot],)
        return self.sample(slot, chat)

    def hold(self, slot):
        """The first half of a step; `sample` is the second."""
        assert slot not in self.held
        if self.left[slot]:
            self.write(slot, len(self.memory[slot]), self.last[slot])
            self.memory[slot] += (self.last[slot],)
            self.held.add(slot)
        return []

    def sample(self, slot, chat):
        seen = self.memory[slot]
        paged = [token for page in self.tables[slot] for token in self.pages[page]][: len(seen)]
        assert tuple(paged) == seen
        self.last[slot] = next_token(seen)
        self.left[slot] = 0 if self.last[slot] == chat.stop else self.left[slot] - 1
        return self.last[slot]

    def write(self, slot, at, token):
        self.pages[self.tables[slot][at // PAGE], at % PAGE] = token


class Server:
    """The engine's loop: it plans a step ahead of what it knows."""

    def __init__(self, pages, slots, snapshots, host=0):
        self.pages, self.slots, self.spare = PagePool(pages), SlotPool(slots), SlotPool(snapshots, first=slots)
        self.device, self.host = ModelRunner(pages, slots), HostPrefixCache(host)
        leaving = lambda node: self.host.put(node.key, self.device.fetch(node))  # noqa: E731
        self.cache = PrefixCache(self.pages, self.spare, leaving) if snapshots else None
        self.scheduler = Scheduler(LIMITS, self.pages, self.slots, self.cache, self.host if snapshots else None)
        self.chats = {}
        self.flight = []
        self.now = 0

    def serve(self, chats, patience=20_000):
        pending = sorted(chats, key=lambda chat: chat.arrives)
        while pending or self.flight or any(chat.outcome is None for chat in chats):
            self.now += 1
            assert self.now < patience, "somebody starves"
            while pending and pending[0].arrives <= self.now:
                self.submit(pending.pop(0))
            for chat in chats:
                if chat.request is not None and chat.outcome is None and chat.leaves <= self.now:
                    self.finish(chat, "left")
            assert self.scheduler.admit(float(self.now)) == []
            for restore in self.scheduler.restores:
                self.device.restore(restore)
            self.scheduler.restores.clear()
            chosen = self.choose()
            plan = self.scheduler.plan()
            flight = self.device.run(plan, self.chats)
            for chat, tokens in [*chosen, *self.flight]:
                self.deliver(chat, tokens)
            self.flight = flight

    def choose(self):
        """Tokens of the held rows whose masks are there."""
        out = []
        for request, chat in self.chats.items():
            ready = self.now >= chat.ready
            request.readable = math.inf if ready else request.total - 1
            if ready and request.stage is Stage.DECODING and request.slot in self.device.held:
                self.device.held.remove(request.slot)
                out.append((chat, [self.device.sample(request.slot, chat)]))
                self.scheduler.go_on(request)
        return out

    def submit(self, chat):
        constrained = chat.late is not None
        chat.request = Request(len(chat.prompt), chat.most, chat.keys(), arrived=float(self.now), constrained=constrained)
        self.chats[chat.request] = chat
        self.scheduler.add(chat.request)

    def deliver(self, chat, tokens):
        for token in tokens:
            if chat.outcome is None:
                chat.answer.append(token)
                chat.request.known += 1
                chat.ready = self.now + (chat.late or 0)
                if token == chat.stop or len(chat.tokens) == chat.most:
                    self.finish(chat, "answered")

    def finish(self, chat, outcome):
        chat.outcome = outcome
        self.scheduler.end(chat.request)

    def check_nothing_is_held(self):
        assert self.slots.free == self.slots.count
        self.scheduler.admit(float(self.now))  # the last plan has run
        if self.cache is not None:
            assert not any(node.pins for node in self.cache._nodes.values())
            self.cache.clear()
            assert self.spare.free == self.spare.count
        assert self.pages.free == self.pages.count


def answers(chats):
    for chat in chats:
        if chat.outcome == "answered":
            assert chat.answer == alone(chat.prompt, chat.most, chat.stop)
        else:
            assert chat.answer == alone(chat.prompt, chat.most, chat.stop)[: len(chat.answer)]


@st.composite
def chat(draw, pages):
    room = pages * PAGE
    shared = draw(st.sampled_from([0, 0, 64, 130, 300]))
    own = draw(st.integers(1, 300))
    seed = draw(st.integers(0, 3))
    rng = np.random.default_rng(seed)
    prompt = ([7] * shared + rng.integers(0, VOCABULARY, own).tolist())[: room - 1]
    most = min(len(prompt) + draw(st.integers(1, 150)), room)
    leaves = draw(st.sampled_from([math.inf, math.inf, math.inf, 3, 9, 40]))
    arrives = draw(st.integers(0, 60))
    late = draw(st.sampled_from([None, None, 0, 5]))
    return Chat(prompt, most, draw(st.integers(0, VOCABULARY + 40)), arrives, arrives + leaves, late)


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(),
    pages=st.integers(2, 40),
    slots=st.integers(1, 6),
    snapshots=st.sampled_from([0, 1, 3, 8]),
    host=st.sampled_from([0, 6, 100]),
)
def test_every_request_ends_as_if_alone_and_nothing_leaks(data, pages, slots, snapshots, host):
    chats = data.draw(st.lists(chat(pages), min_size=1, max_size=14))
    server = Server(pages, slots, snapshots, host)
    server.serve(chats)
    answers(chats)
    assert {chat.outcome for chat in chats} <= {"answered", "left"}
    server.check_nothing_is_held()


def conversation(length, most, **fields):
    return Chat([i % VOCABULARY for i in range(length)], most, stop=-1, **fields)


def test_preempted_answers_go_on_where_they_were():
    chats = [Chat([i] * 60, 500, stop=-1) for i in range(4)]  # 4 x 8 pages wanted, 12 there
    server = Server(12, 4, 0)
    server.serve(chats)
    answers(chats)
    assert server.scheduler.preemptions > 0
    assert min(chats, key=lambda c: c.request.rank).request is chats[0].request
    server.check_nothing_is_held()


def test_constrained_rows_take_part_in_each_step_and_late_ones_hold_up_nobody():
    streams = [Chat([i] * 60, 160, stop=-1, late=late) for i, late in enumerate([None, 0, 9])]
    server = Server(40, 4, 0)
    took, run = {id(chat): 0 for chat in streams}, server.device.run

    def watched(plan, chats):
        for row in plan.rows:
            took[id(chats[row])] += 1
        return run(plan, chats)

    server.device.run = watched
    server.serve(streams[:2])
    answers(streams[:2])
    assert [took[id(chat)] for chat in streams[:2]] == [99, 99]  # a token a step for both, the first from the prompt
    free = Chat([0] * 60, 160, stop=-1)
    took[id(free)], begun = 0, server.now
    server.serve([free, streams[2]])
    answers([free, streams[2]])
    assert took[id(free)] == 99 and took[id(streams[2])] == 99
    assert server.now - begun > 9 * 99
    server.check_nothing_is_held()


def test_the_oldest_is_never_put_back():
    chats = [Chat([i] * 60, 500, stop=-1) for i in range(4)]
    server = Server(12, 4, 0)
    put_back, plan = [], server.scheduler.plan
    server.scheduler.plan = lambda: put_back.extend((step := plan()).preempted) or step
    server.serve(chats)
    assert put_back and chats[0].request not in put_back


def test_a_prefix_is_read_once():
    first, second, other = conversation(400, 405), conversation(400, 405, arrives=30), conversation(300, 305, arrives=60)
    server = Server(40, 4, 8)
    server.serve([first, second, other])
    answers([first, second, other])
    assert server.scheduler.prompt_tokens == 1100
    assert server.scheduler.cached_tokens == 384  # of the second; the third parts inside a path that has one snapshot, at its end


def test_where_prompts_part_a_snapshot_is_made():
    system = [5] * 200
    chats = [Chat(system + [i] * 100, 310, stop=-1, arrives=30 * i) for i in range(3)]
    server = Server(40, 4, 8)
    server.serve(chats)
    answers(chats)
    assert server.scheduler.cached_tokens == 192  # the second found the parting, the third starts there


def test_the_least_recently_used_snapshot_goes_first():
    chats = [Chat([i] * 130, 132, stop=-1, arrives=20 * n) for n, i in enumerate([0, 1, 0, 2, 0, 1])]
    server = Server(40, 2, 2)
    server.serve(chats)
    answers(chats)
    assert server.scheduler.cached_tokens == 2 * 128  # of 0 twice; 1 had gone for 2
    assert server.cache.snapshots == 2


def test_what_had_to_leave_the_device_comes_back_from_the_host():
    chats = [Chat([i] * 200, 205, stop=-1, arrives=20 * n) for n, i in enumerate([0, 1, 2, 0, 1, 2])]
    server = Server(40, 2, 1, host=100)
    server.serve(chats)
    answers(chats)
    assert server.scheduler.cached_tokens == server.scheduler.restored_tokens == 3 * 192
    small = Server(40, 2, 1, host=5)  # pages: one prefix has three
    small.serve([dataclasses.replace(chat, answer=[], outcome=None) for chat in chats])
    assert small.scheduler.restored_tokens == 0 and small.host.used == 3


def test_a_long_prompt_holds_up_neither_streams_nor_short_prompts():
    stream, long, short = conversation(10, 300), conversation(2000, 2010, arrives=5), Chat([3] * 70, 75, stop=-1, arrives=6)
    server = Server(60, 4, 0)
    gaps, began, run = [], {}, server.device.run

    def watched(plan, chats):
        for piece in plan.pieces:
            began.setdefault(id(chats[piece.request]), server.now)
        if stream.request in plan.rows:
            gaps.append(server.now)
        return run(plan, chats)

    server.device.run = watched
    server.serve([stream, long, short])
    answers([stream, long, short])
    assert set(np.diff(gaps)) == {1}  # a token in every step
    assert began[id(short)] <= 8  # though the long one is read until step 5 + 2000 / 256


def test_priority_goes_first_and_yet_nobody_starves():
    scheduler = Scheduler(LIMITS, PagePool(10), SlotPool(1))
    late = Request(10, 20, arrived=100.0, priority=1)
    early = Request(10, 20, arrived=100.0 - PATIENCE_S / 2)
    earlier = Request(10, 20, arrived=100.0 - 2 * PATIENCE_S)
    for request in (late, early, earlier):
        scheduler.add(request)
    assert scheduler.waiting == [earlier, late, early]


def test_who_has_not_begun_in_time_expires():
    scheduler = Scheduler(LIMITS, PagePool(10), SlotPool(1))
    runs, waits = Request(10, 20, deadline=5.0), Request(10, 20, deadline=5.0)
    scheduler.add(runs)
    scheduler.add(waits)
    assert scheduler.admit(1.0) == []
    scheduler.plan()
    assert scheduler.admit(6.0) == [waits] and waits.stage is Stage.ENDED
    assert scheduler.plan().rows == [runs]


def test_pictures_that_are_not_ready_are_waited_for():
    scheduler = Scheduler(LIMITS, PagePool(10), SlotPool(2))
    request, other = Request(300, 310, readable=100), Request(20, 30)
    scheduler.add(request)
    scheduler.add(other)
    scheduler.admit(0.0)
    pieces = {piece.request: (piece.start, piece.count) for piece in scheduler.plan().pieces}
    assert pieces == {request: (0, 64), other: (0, 20)}
    assert scheduler.plan().pieces == []
    request.readable = 300
    assert [(piece.start, piece.count) for piece in scheduler.plan().pieces] == [(64, 236)]


def test_several_tokens_a_dispatch_only_where_nobody_is_read():
    scheduler = Scheduler(LIMITS, PagePool(40), SlotPool(2))
    scheduler.add(Request(10, 100))
    scheduler.admit(0.0)
    assert scheduler.plan().rows == []
    assert scheduler.plan().steps == 1  # behind it the first token is told
    assert scheduler.plan().steps == LIMITS.steps
    scheduler.add(Request(1000, 1100))
    scheduler.admit(0.0)
    assert scheduler.plan().steps == 1


def test_pages_know_their_holders():
    pages = PagePool(3)
    taken = pages.take(2)
    pages.share(taken[:1])
    pages.give_back(taken)
    assert pages.free == 2 and pages.holders(taken[0]) == 1
    with pytest.raises(AssertionError, match="is free"):
        pages.give_back(taken[1:])
    with pytest.raises(AssertionError, match="3 pages wanted, 2 free"):
        pages.take(3)


def test_a_page_is_the_kernels():
    assert kernels_pallas.paged_attention.PAGE == PAGE
    assert pages_of(np.array([0, 1, 64, 65])).tolist() == [0, 1, 1, 2]
