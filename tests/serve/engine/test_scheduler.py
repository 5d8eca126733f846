"""The scheduler with a fake device that can be checked by hand: the state of a slot is the tokens themselves.

The next token of a sequence is a checksum of all tokens before it, so any wrong page, slot or snapshot gives
a wrong output at once.
"""

import dataclasses
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.page_size import PAGE
from serve.engine.host_prefix_cache import HostPrefixCache
from serve.engine.page_pool import PagePool, SlotPool, num_pages
from serve.engine.prefix_cache import PrefixCache
from serve.engine.scheduler import PRIORITY_S, Request, Scheduler, Stage, StepLimits

VOCABULARY = 97
LIMITS = StepLimits(max_tokens=256, max_prompts=4, max_decode_steps=4)


def next_token(tokens):
    return (31 * sum((i + 1) * token for i, token in enumerate(tokens)) + len(tokens)) % VOCABULARY


def generate_alone(prompt, max_total, stop):
    """Returns the output: it ends with `stop`, or when prompt and output have `max_total` tokens."""
    tokens = list(prompt)
    while len(tokens) < max_total:
        tokens.append(next_token(tokens))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]


@dataclasses.dataclass
class Chat:
    """A client's side of a request. Times are numbers of steps.

    Attributes:
      mask_delay: steps until the next grammar mask is ready; None without structured output.
      mask_ready_at: when the next grammar mask is ready.
    """

    prompt: list[int]
    max_total: int
    stop: int
    arrives_at: int = 0
    cancels_at: float = math.inf
    mask_delay: int | None = None
    mask_ready_at: float = 0
    request: Request | None = None
    output: list[int] = dataclasses.field(default_factory=list)
    outcome: str | None = None

    @property
    def tokens(self):
        return self.prompt + self.output

    def block_hashes(self):
        return [repr(self.prompt[: PAGE * (i + 1)]).encode() for i in range(len(self.prompt) // PAGE)]


class FakeRunner:
    """Pages hold tokens; the state of a slot is all tokens before the next one."""

    def __init__(self, pages, slots):
        self.pages = np.full((pages, PAGE), -1)
        self.state = {}
        self.block_tables = {}
        self.tokens_left = {}
        self.last = {}
        self.held = set()
        self.slots = slots

    def run(self, step, chats):
        """Returns the tokens that each request received."""
        written = [slot for chunk in step.prefill_chunks for _, slot in chunk.snapshots]
        assert len(set(written)) == len(written)
        out = [(chats[chunk.request], self.prefill(chunk, chats[chunk.request])) for chunk in step.prefill_chunks]
        assert len({id(row) for row in step.rows}) == len(step.rows) == len(step.slots)
        assert sum(chunk.num_tokens for chunk in step.prefill_chunks) <= LIMITS.max_tokens
        assert len(step.prefill_chunks) <= LIMITS.max_prompts
        rows = zip(step.slots, step.rows, step.new_pages, step.awaiting_mask, strict=True)
        for slot, row, (index, page), awaits_mask in rows:
            table, chat = self.block_tables[slot], chats[row]
            if page >= 0:
                assert index == len(table)
                table.append(page)
            assert awaits_mask == (chat.mask_delay is not None) and (step.num_steps == 1 or not awaits_mask)
            if awaits_mask:
                out.append((chat, self.hold(slot)))
            else:
                out.append((chat, [self.decode(slot, chat) for _ in range(step.num_steps)]))
        return out

    def offload(self, evicted):
        """Returns a whole prefix: its state and its pages, which must agree."""
        pages = [self.pages[page].copy() for page in evicted.pages]
        assert tuple(np.concatenate(pages).tolist()) == self.state[evicted.snapshot_slot]
        return SimpleNamespace(nbytes=len(pages), pages=pages, state=self.state[evicted.snapshot_slot])

    def restore(self, restore):
        self.state[restore.snapshot_slot] = restore.prefix.state
        for page, values in zip(restore.pages, restore.prefix.pages[restore.first_page :], strict=True):
            self.pages[page] = values

    def prefill(self, chunk, chat):
        slot, end = chunk.request.slot, chunk.start + chunk.num_tokens
        assert chunk.start % PAGE == 0
        self.block_tables[slot] = list(chunk.request.pages)
        state = () if chunk.source_slot < 0 else self.state[chunk.source_slot]
        assert state == tuple(chat.tokens[: chunk.start])
        for at in range(chunk.start, end):
            self.write(slot, at, chat.tokens[at])
        self.state[slot] = tuple(chat.tokens[:end])
        for pages, snapshot_slot in chunk.snapshots:
            assert snapshot_slot >= self.slots
            self.state[snapshot_slot] = tuple(chat.tokens[: chunk.start + pages * PAGE])
        self.held.discard(slot)
        if not chunk.is_last:
            return []
        self.tokens_left[slot] = chat.max_total - end
        return [self.sample(slot, chat)]

    def decode(self, slot, chat):
        if not self.tokens_left[slot]:
            return self.last[slot]
        self.append_last(slot)
        return self.sample(slot, chat)

    def hold(self, slot):
        """Computes and holds the logits of a slot; `sample` samples them."""
        assert slot not in self.held
        if self.tokens_left[slot]:
            self.append_last(slot)
            self.held.add(slot)
        return []

    def append_last(self, slot):
        self.write(slot, len(self.state[slot]), self.last[slot])
        self.state[slot] += (self.last[slot],)

    def sample(self, slot, chat):
        seen = self.state[slot]
        paged = [token for page in self.block_tables[slot] for token in self.pages[page]][: len(seen)]
        assert tuple(paged) == seen
        self.last[slot] = next_token(seen)
        self.tokens_left[slot] = 0 if self.last[slot] == chat.stop else self.tokens_left[slot] - 1
        return self.last[slot]

    def write(self, slot, at, token):
        self.pages[self.block_tables[slot][at // PAGE], at % PAGE] = token


class Server:
    """The engine's loop: it schedules a step before it reads the tokens of the step before."""

    def __init__(self, pages, slots, snapshots, host=0):
        self.pages, self.slots, self.snapshots = PagePool(pages), SlotPool(slots), SlotPool(snapshots, first=slots)
        self.runner, self.host_cache = FakeRunner(pages, slots), HostPrefixCache(host)
        offload = lambda evicted: self.host_cache.put(evicted.block_hash, self.runner.offload(evicted))  # noqa: E731
        self.prefix_cache = PrefixCache(self.pages, self.snapshots, offload) if snapshots else None
        host_cache = self.host_cache if snapshots else None
        self.scheduler = Scheduler(LIMITS, self.pages, self.slots, self.prefix_cache, host_cache)
        self.chats = {}
        self.in_flight = []
        self.now = 0

    def serve(self, chats, max_steps=20_000, resets=()):
        """Serves chats to their ends; the steps before those in `resets` fail, and all state is lost."""
        pending = sorted(chats, key=lambda chat: chat.arrives_at)
        while pending or self.in_flight or any(chat.outcome is None for chat in chats):
            self.now += 1
            assert self.now < max_steps, "a request starves"
            while pending and pending[0].arrives_at <= self.now:
                self.submit(pending.pop(0))
            for chat in chats:
                if chat.request is not None and chat.outcome is None and chat.cancels_at <= self.now:
                    self.finish(chat, "cancelled")
            if self.now in resets:
                self.reset(chat for chat in chats if chat.request is not None and chat.outcome is None)
            assert self.scheduler.admit(float(self.now)) == []
            for restore in self.scheduler.restores:
                self.runner.restore(restore)
            self.scheduler.restores.clear()
            sampled = self.sample_held()
            step = self.scheduler.schedule()
            in_flight = self.runner.run(step, self.chats)
            for chat, tokens in [*sampled, *self.in_flight]:
                self.deliver(chat, tokens)
            self.in_flight = in_flight

    def reset(self, chats):
        self.scheduler.reset([chat.request for chat in chats])
        self.in_flight = []
        self.runner.held.clear()

    def sample_held(self):
        """Samples held rows whose grammar masks are ready."""
        out = []
        for request, chat in self.chats.items():
            ready = self.now >= chat.mask_ready_at
            request.num_ready_tokens = math.inf if ready else request.num_tokens - 1
            if ready and request.stage is Stage.DECODE and request.slot in self.runner.held:
                self.runner.held.remove(request.slot)
                out.append((chat, [self.runner.sample(request.slot, chat)]))
                self.scheduler.mark_sampled(request)
        return out

    def submit(self, chat):
        chat.request = Request(
            len(chat.prompt),
            chat.max_total,
            chat.block_hashes(),
            arrival_time=float(self.now),
            uses_grammar=chat.mask_delay is not None,
        )
        self.chats[chat.request] = chat
        self.scheduler.add(chat.request)

    def deliver(self, chat, tokens):
        for token in tokens:
            if chat.outcome is None:
                chat.output.append(token)
                chat.request.num_output_tokens += 1
                chat.mask_ready_at = self.now + (chat.mask_delay or 0)
                if token == chat.stop or len(chat.tokens) == chat.max_total:
                    self.finish(chat, "finished")

    def finish(self, chat, outcome):
        chat.outcome = outcome
        self.scheduler.finish(chat.request)

    def check_everything_is_free(self):
        assert self.slots.num_free == self.slots.count
        self.scheduler.admit(float(self.now))  # the last step has run
        if self.prefix_cache is not None:
            assert not any(node.pins for node in self.prefix_cache._nodes.values())
            assert self.prefix_cache.evict_until_free(self.pages.count)
            assert self.snapshots.num_free == self.snapshots.count
        assert self.pages.num_free == self.pages.count


def check_outputs(chats):
    for chat in chats:
        if chat.outcome == "finished":
            assert chat.output == generate_alone(chat.prompt, chat.max_total, chat.stop)
        else:
            assert chat.output == generate_alone(chat.prompt, chat.max_total, chat.stop)[: len(chat.output)]


@st.composite
def random_chat(draw, pages):
    room = pages * PAGE
    shared = draw(st.sampled_from([0, 0, 64, 130, 300]))
    own = draw(st.integers(1, 300))
    seed = draw(st.integers(0, 3))
    rng = np.random.default_rng(seed)
    prompt = ([7] * shared + rng.integers(0, VOCABULARY, own).tolist())[: room - 1]
    max_total = min(len(prompt) + draw(st.integers(1, 150)), room)
    cancels_after = draw(st.sampled_from([math.inf, math.inf, math.inf, 3, 9, 40]))
    arrives_at = draw(st.integers(0, 60))
    mask_delay = draw(st.sampled_from([None, None, 0, 5]))
    stop = draw(st.integers(0, VOCABULARY + 40))
    return Chat(prompt, max_total, stop, arrives_at, arrives_at + cancels_after, mask_delay)


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(),
    pages=st.integers(2, 40),
    slots=st.integers(1, 6),
    snapshots=st.sampled_from([0, 1, 3, 8]),
    host=st.sampled_from([0, 6, 100]),
    resets=st.sets(st.integers(1, 150), max_size=3),
)
def test_batched_outputs_equal_single_outputs_and_nothing_leaks(data, pages, slots, snapshots, host, resets):
    chats = data.draw(st.lists(random_chat(pages), min_size=1, max_size=14))
    server = Server(pages, slots, snapshots, host)
    server.serve(chats, resets=resets)
    check_outputs(chats)
    assert {chat.outcome for chat in chats} <= {"finished", "cancelled"}
    server.check_everything_is_free()


def conversation(length, max_total, **fields):
    return Chat([i % VOCABULARY for i in range(length)], max_total, stop=-1, **fields)


def test_error_of_on_evict_leaves_the_prefix_cache_consistent():
    def fail(evicted):
        raise MemoryError

    pages, slots = PagePool(4), SlotPool(1)
    cache = PrefixCache(pages, slots, fail)
    taken = pages.allocate(2)
    cache.add([b"a", b"b"], taken).pins = 0
    pages.free(taken)
    with pytest.raises(MemoryError):
        cache.evict_until_free(4)
    assert (pages.num_free, slots.num_free, cache.num_snapshots) == (4, 1, 0)
    assert cache.find([b"a", b"b"]).num_known_blocks == 0


def test_preempted_requests_resume_where_they_were():
    chats = [Chat([i] * 60, 500, stop=-1) for i in range(4)]  # 4 x 8 pages are needed, and 12 exist
    server = Server(12, 4, 0)
    server.serve(chats)
    check_outputs(chats)
    assert server.scheduler.preemptions > 0
    assert min(chats, key=lambda c: c.request.rank).request is chats[0].request
    server.check_everything_is_free()


def test_grammar_rows_join_every_step_and_late_masks_delay_no_other_row():
    streams = [Chat([i] * 60, 160, stop=-1, mask_delay=delay) for i, delay in enumerate([None, 0, 9])]
    server = Server(40, 4, 0)
    num_steps, run = {id(chat): 0 for chat in streams}, server.runner.run

    def watched(step, chats):
        for row in step.rows:
            num_steps[id(chats[row])] += 1
        return run(step, chats)

    server.runner.run = watched
    server.serve(streams[:2])
    check_outputs(streams[:2])
    assert [num_steps[id(chat)] for chat in streams[:2]] == [99, 99]  # one token a step for both; the first is the prefill's
    free = Chat([0] * 60, 160, stop=-1)
    num_steps[id(free)], begun = 0, server.now
    server.serve([free, streams[2]])
    check_outputs([free, streams[2]])
    assert num_steps[id(free)] == 99 and num_steps[id(streams[2])] == 99
    assert server.now - begun > 9 * 99
    server.check_everything_is_free()


def test_highest_ranked_request_is_never_preempted():
    chats = [Chat([i] * 60, 500, stop=-1) for i in range(4)]
    server = Server(12, 4, 0)
    preempted, schedule = [], server.scheduler.schedule
    server.scheduler.schedule = lambda: preempted.extend((step := schedule()).preempted) or step
    server.serve(chats)
    assert preempted and chats[0].request not in preempted


def test_shared_prefix_is_prefilled_once():
    first, second = conversation(400, 405), conversation(400, 405, arrives_at=30)
    other = conversation(300, 305, arrives_at=60)
    server = Server(40, 4, 8)
    server.serve([first, second, other])
    check_outputs([first, second, other])
    assert server.scheduler.prompt_tokens == 1100
    assert server.scheduler.cached_tokens == 384  # of the second; the third differs before the only snapshot, at the end


def test_prompt_of_whole_pages_is_reused():
    chats = [conversation(384, 390, arrives_at=30 * i) for i in range(3)]
    server = Server(40, 4, 8)
    server.serve(chats)
    check_outputs(chats)
    assert server.scheduler.cached_tokens == 2 * 320  # the last page is prefilled, for its logits


def test_snapshot_is_taken_where_prompts_diverge():
    system = [5] * 200
    chats = [Chat(system + [i] * 100, 310, stop=-1, arrives_at=30 * i) for i in range(3)]
    server = Server(40, 4, 8)
    server.serve(chats)
    check_outputs(chats)
    assert server.scheduler.cached_tokens == 192  # the second takes the snapshot, the third starts from it


def test_least_recently_used_snapshot_is_evicted_first():
    chats = [Chat([i] * 130, 132, stop=-1, arrives_at=20 * n) for n, i in enumerate([0, 1, 0, 2, 0, 1])]
    server = Server(40, 2, 2)
    server.serve(chats)
    check_outputs(chats)
    assert server.scheduler.cached_tokens == 2 * 128  # prompt 0 twice; prompt 1 was evicted for prompt 2
    assert server.prefix_cache.num_snapshots == 2


def test_evicted_prefixes_are_restored_from_the_host():
    chats = [Chat([i] * 200, 205, stop=-1, arrives_at=20 * n) for n, i in enumerate([0, 1, 2, 0, 1, 2])]
    server = Server(40, 2, 1, host=100)
    server.serve(chats)
    check_outputs(chats)
    assert server.scheduler.cached_tokens == server.scheduler.restored_tokens == 3 * 192
    small = Server(40, 2, 1, host=5)  # pages: one prefix has three
    small.serve([dataclasses.replace(chat, output=[], outcome=None) for chat in chats])
    assert small.scheduler.restored_tokens == 0 and small.host_cache.used_bytes == 3


def test_long_prompt_delays_neither_streams_nor_short_prompts():
    stream, long = conversation(10, 300), conversation(2000, 2010, arrives_at=5)
    short = Chat([3] * 70, 75, stop=-1, arrives_at=6)
    server = Server(60, 4, 0)
    token_steps, started, run = [], {}, server.runner.run

    def watched(step, chats):
        for chunk in step.prefill_chunks:
            started.setdefault(id(chats[chunk.request]), server.now)
        if stream.request in step.rows:
            token_steps.append(server.now)
        return run(step, chats)

    server.runner.run = watched
    server.serve([stream, long, short])
    check_outputs([stream, long, short])
    assert set(np.diff(token_steps)) == {1}  # a token in every step
    assert started[id(short)] <= 8  # although the long prompt is prefilled until step 5 + 2000 / 256


def test_priority_counts_as_seconds_of_arrival_time():
    scheduler = Scheduler(LIMITS, PagePool(10), SlotPool(1))
    late = Request(10, 20, arrival_time=100.0, priority=1)
    early = Request(10, 20, arrival_time=100.0 - PRIORITY_S / 2)
    earlier = Request(10, 20, arrival_time=100.0 - 2 * PRIORITY_S)
    for request in (late, early, earlier):
        scheduler.add(request)
    assert scheduler.waiting == [earlier, late, early]


def test_request_expires_after_queue_deadline():
    scheduler = Scheduler(LIMITS, PagePool(10), SlotPool(1))
    running, waiting = Request(10, 20, deadline=5.0), Request(10, 20, deadline=5.0)
    scheduler.add(running)
    scheduler.add(waiting)
    assert scheduler.admit(1.0) == []
    scheduler.schedule()
    assert scheduler.admit(6.0) == [waiting] and waiting.stage is Stage.FINISHED
    assert scheduler.schedule().rows == [running]


def chunk_ranges(step):
    return {chunk.request: (chunk.start, chunk.num_tokens) for chunk in step.prefill_chunks}


def test_prefill_waits_for_images_that_are_not_encoded():
    scheduler = Scheduler(LIMITS, PagePool(10), SlotPool(2))
    request, other = Request(300, 310, num_ready_tokens=100), Request(20, 30)
    scheduler.add(request)
    scheduler.add(other)
    scheduler.admit(0.0)
    assert chunk_ranges(scheduler.schedule()) == {request: (0, 64), other: (0, 20)}
    assert scheduler.schedule().prefill_chunks == []
    request.num_ready_tokens = 300
    assert chunk_ranges(scheduler.schedule()) == {request: (64, 236)}


def test_several_decode_steps_only_while_no_prompt_is_prefilled():
    scheduler = Scheduler(LIMITS, PagePool(40), SlotPool(2))
    scheduler.add(Request(10, 100))
    scheduler.admit(0.0)
    assert scheduler.schedule().rows == []
    assert scheduler.schedule().num_steps == 1  # the first token is delivered after it
    assert scheduler.schedule().num_steps == LIMITS.max_decode_steps
    scheduler.add(Request(1000, 1100))
    scheduler.admit(0.0)
    assert scheduler.schedule().num_steps == 1


def test_pages_count_references():
    pages = PagePool(3)
    allocated = pages.allocate(2)
    pages.incref(allocated[:1])
    pages.free(allocated)
    assert pages.num_free == 2 and pages.ref_count(allocated[0]) == 1
    with pytest.raises(AssertionError, match="is free"):
        pages.free(allocated[1:])
    with pytest.raises(AssertionError, match="3 pages wanted, 2 free"):
        pages.allocate(3)


def test_num_pages_of_token_counts():
    assert num_pages(np.array([0, 1, 64, 65])).tolist() == [0, 1, 1, 2]


def test_scheduling_modules_import_no_jax():
    modules = "scheduler", "page_pool", "prefix_cache", "host_prefix_cache", "encoder_cache"
    imports = "; ".join(f"import serve.engine.{module}" for module in modules)
    check = f"import sys; {imports}; assert not any(name.split('.')[0] == 'jax' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
