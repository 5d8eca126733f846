"""Continuous batching: one thread plans steps, sends them to the device, and hands out what comes back.

It sends step n + 1 before it looks at what step n sampled, so that the device has work while the host turns tokens into text.
A step is at most one pass of the tower, one reading of prompts and one dispatch of decoding, in this order; that bounds how long
a stream waits for its next token, whatever else arrives.

Of a constrained answer a dispatch computes the scores alone, which need no mask. By the time they are there so is the mask, made
on the host meanwhile. Then the choice of its token is sent, and the next dispatch behind it, before anybody has looked at that
token. A step waits for masks a millisecond at most; an answer whose mask is late rests, and has the next.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from minicpmv46_jax import MiniCPMV
from minicpmv46_jax.generation.decoding import has_penalties
from minicpmv46_jax.generation.generate import row_tokens
from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.generation.sampling import Sampled
from minicpmv46_jax.library import Delta
from minicpmv46_jax.processing import Inputs
from serve.engine.encoder_cache import EncoderCache
from serve.engine.engine_client import (
    Cancelled,
    EngineClient,
    EngineFull,
    EngineStopped,
    RequestHandle,
    RequestRejected,
    notify_readers,
)
from serve.engine.grammar_masks import GrammarMasks
from serve.engine.host_prefix_cache import HostPrefixCache
from serve.engine.metrics import Metrics
from serve.engine.model_runner import MODES, ModelRunner, PrefillRow
from serve.engine.page_pool import PAGE, PagePool, SlotPool
from serve.engine.prefix_cache import Node, PrefixCache
from serve.engine.request import EngineRequest, MultimodalItem, prepare
from serve.engine.request_state import RequestState
from serve.engine.scheduler import Limits, PrefillChunk, Request, Scheduler, SchedulerOutput
from serve.runtime.program_cache import CompilationCounter

log = logging.getLogger("serve")

MAX_WAITING = 512  # requests that may wait, beyond those that run
PREPARE_THREADS = 4  # hashing and laying out let go of the GIL
MOST_LANDING = 8  # prefixes on their way to the host at once: each holds 43 MB or more of the device's memory until it is there


@dataclasses.dataclass(frozen=True)
class QueuePolicy:
    """What the engine takes on.

    Attributes:
      max_waiting: requests that may wait, or be prepared, beyond those that run.
      host_bytes: of host memory for prefixes that had to leave the device.
      max_wait_s: seconds a request may wait before it begins; None for as long as it takes.
    """

    max_waiting: int = MAX_WAITING
    max_wait_s: float | None = None
    host_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class InFlightStep:
    """A step under way: what was planned, and what the device will have sampled."""

    plan: SchedulerOutput
    started: Sampled | None
    decoded: Sampled | None

    @property
    def begins(self) -> bool:
        """Whether answers begin in it and none goes on."""
        return self.started is not None and self.decoded is None

    @property
    def requests(self) -> list[Request]:
        """All that take part."""
        return [*(piece.request for piece in self.plan.pieces), *self.plan.rows]


@dataclasses.dataclass(frozen=True)
class PendingGrammarSample:
    """Tokens of constrained answers under way: whose they are, and what the device will have sampled."""

    requests: list[Request]
    sampled: Sampled


class Engine(EngineClient):
    """A model that answers many requests at once.

    Args:
      model: its detokenizer is used here.
      device: the steps over its parameters, ready.
      policy: whom to take on.
    """

    def __init__(self, model: MiniCPMV, device: ModelRunner, policy: QueuePolicy | None = None):
        self.policy = policy or QueuePolicy()
        self.sizes = sizes = device.sizes
        super().__init__(sizes.running + self.policy.max_waiting)
        self._model, self._device = model, device
        self.programs = device.programs
        self.compilations = CompilationCounter()
        self.features = EncoderCache(sizes.features)
        self.pages, self.slots = PagePool(sizes.pages), SlotPool(sizes.running)
        self.snapshots = SlotPool(sizes.snapshots, first=sizes.running)
        self.prefixes = PrefixCache(self.pages, self.snapshots, self._copy_to_host) if sizes.snapshots else None
        self.host = HostPrefixCache(self.policy.host_bytes)
        tokens, prompts = sizes.buckets.prompts[-1]
        limits = Limits(tokens, prompts, sizes.buckets.steps)
        self.scheduler = Scheduler(limits, self.pages, self.slots, self.prefixes, self.host if sizes.snapshots else None)
        self.metrics = Metrics(self)
        self._answers: dict[Request, RequestState] = {}
        self._of_job: dict[RequestHandle, RequestState] = {}
        self._inbox: list[tuple[RequestHandle, EngineRequest]] = []
        self._gone: list[RequestHandle] = []
        self._flight: InFlightStep | None = None
        self._encoding: list[Request] = []  # whose pictures are in the pass being sent
        self._choosing: list[Request] = []  # whose tokens are being chosen
        self._held: dict[Request, RequestState] = {}  # whose scores the device keeps
        self.masks = GrammarMasks()
        self._landing: list[Future] = []
        self._pool = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="lay")
        self._lander = ThreadPoolExecutor(1, thread_name_prefix="land")  # apart: it waits for the device
        self.start()

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its answer may have."""
        return self.sizes.longest

    def close(self, timeout_s: float = 10.0) -> None:
        super().close(timeout_s)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._lander.shutdown(wait=False, cancel_futures=True)
        self.masks.close()

    def add_request(self, job: RequestHandle, inputs: Inputs, options: GenerationOptions) -> None:
        self._check(inputs)
        with self.changed:
            if self.stopping:
                raise EngineStopped
        self._pool.submit(self._prepare, job, inputs, options)

    def abort_request(self, job: RequestHandle) -> None:
        with self.changed:
            self._gone.append(job)
            self.changed.notify_all()

    def _check(self, inputs: Inputs) -> None:
        total, limit = len(inputs.token_ids), self.max_model_len
        if total >= limit:
            raise RequestRejected(
                f"the prompt has {total} tokens, and this server holds {limit}, at least one of them the answer's"
            )
        for view in inputs.views:
            if self._device.pass_for([len(view.pixels)]) is None:
                longest = self.sizes.buckets.passes[-1].longest
                h, w = view.grid
                raise RequestRejected(f"a picture has a view of {h} x {w} patches, and this server encodes {longest} at most")

    def _prepare(self, job: RequestHandle, inputs: Inputs, options: GenerationOptions) -> None:
        try:
            work = prepare(inputs, options, self._model.config.vision.positions_per_side)
        except Exception as error:
            self.finish_request(job, error)
            return
        with self.changed:
            if not self.stopping:
                self._inbox.append((job, work))
                self.changed.notify_all()
                return
        self.finish_request(job, EngineStopped())

    def work(self) -> None:
        """The thread's: steps, as long as there is anything to do."""
        outcome: Exception = EngineStopped()
        try:
            while self._take_news():
                self._turn()
        except Exception as error:  # what `_turn` could not recover from: nothing can be answered any more
            log.exception("the engine has failed")
            outcome = error
        with self.changed:
            self.stopping = True
            jobs = [*self._of_job, *(job for job, _ in self._inbox)]
        for job in jobs:
            self.finish_request(job, outcome)

    def _take_news(self) -> bool:
        """Waits for something to do; False if there will be no more."""
        with self.changed:
            self.changed.wait_for(lambda: self._inbox or self._gone or self._answers or self._flight or self.stopping)
            if self.stopping:
                return False
            (inbox, self._inbox), (gone, self._gone) = (self._inbox, []), (self._gone, [])
        for job, work in inbox:
            if job.cancelled:
                self.finish_request(job, Cancelled())
            else:
                self._enter(job, work)
        for job in gone:
            if job in self._of_job:  # else it has ended, or is being prepared
                self._end(self._of_job[job], Cancelled())
        return True

    def _enter(self, job: RequestHandle, work: EngineRequest) -> None:
        answer = RequestState(job, work, self.max_model_len, self._model.detokenizer)
        if self.policy.max_wait_s is not None:
            answer.request.deadline = job.reserved_at + self.policy.max_wait_s
        self._answers[answer.request] = self._of_job[job] = answer
        self.metrics.prompt_tokens.inc(len(work.ids))
        self.scheduler.add(answer.request)

    def _turn(self) -> None:
        """One step is sent, and the one before is looked at."""
        begun = time.perf_counter()
        for request in self.scheduler.admit(time.monotonic()):
            self._end(self._answers[request], EngineFull(f"it waited {self.policy.max_wait_s:g} seconds without beginning"))
        previous, self._flight, plan = self._flight, None, None
        if previous is not None and previous.begins and not self.scheduler.reading:
            # Nothing is queued on the device behind these first tokens, and nobody waits to be read: they go out first.
            try:
                self._receive(previous)
            except Exception as error:
                self._recover(error, previous.requests, None)
                return
            previous = None
        try:
            self._restore()
            self._encode()
            choice = self._choose()
            plan = self.scheduler.plan()
            for request in plan.preempted:
                self._answers[request].unpin(self.features, everything=True)
                self._held.pop(request, None)
            self._flight = self._send(plan)
        except Exception as error:
            before_plan = self._encoding or self._choosing or self.scheduler.reading
            self._recover(error, before_plan if plan is None else InFlightStep(plan, None, None).requests, previous)
            return
        self.metrics.host.inc(time.perf_counter() - begun)
        try:
            self._take(choice)
            self._receive(previous)
        except Exception as error:
            sent = [flight.requests for flight in (previous, choice) if flight is not None]
            self._recover(error, list(itertools.chain.from_iterable(sent)), None)

    def _copy_to_host(self, node: Node) -> None:
        """For the prefix cache: a snapshot is about to leave the device; for good, unless it is worth a copy.

        What one step reads is read again sooner than it is copied there and back (on an H200 512 tokens in 3.3 ms, and 26 MB of
        memory, keys and values take 4.5 and 5.3).
        """
        self._landing = [copying for copying in self._landing if not copying.done()]
        path = node.path()
        long = len(path) * PAGE >= self.scheduler.limits.tokens
        if self.policy.host_bytes and long and len(self._landing) < MOST_LANDING:
            copy = self._device.fetch([page.page for page in path], node.snapshot)
            self.host.put(node.key, copy)
            self._landing.append(self._lander.submit(copy.land))

    def _restore(self) -> None:
        """Puts back what requests that were just admitted will start from."""
        restores, self.scheduler.restores = self.scheduler.restores, []
        for restore in restores:
            self._device.store(restore.copy, restore.first, restore.pages, restore.slot)

    def _encode(self) -> None:
        """Sends one pass of the tower with the pictures that are needed first, of one mode and of any requests."""
        views: list[MultimodalItem] = []
        rows: list[np.ndarray] = []
        self._encoding = []
        for request in sorted(self.scheduler.reading, key=lambda request: request.rank):
            answer = self._answers[request]
            for picture in answer.missing():
                entry = self.features.find(picture.key)
                if entry is None and self._fits(views, picture):
                    entry = self.features.reserve(picture.key, picture.laid.num_tokens)
                    if entry is not None:
                        views.append(picture)
                        rows.append(entry.rows)
                        self._encoding.append(request)
                if entry is None:
                    break
                answer.pin(picture, entry)
            answer.set_readable()
        if views:
            self._device.encode([picture.laid for picture in views], rows)
            self.metrics.encoded.inc(len(views))
        self._encoding = []

    def _fits(self, views: list[MultimodalItem], picture: MultimodalItem) -> bool:
        """Whether the picture may join the pass."""
        if views and views[0].laid.downsample_mode != picture.laid.downsample_mode:
            return False
        return self._device.pass_for([len(view.laid.patches) for view in (*views, picture)]) is not None

    def _choose(self) -> PendingGrammarSample | None:
        """Sends the choice of tokens for which the device has kept the scores and whose masks are there."""
        for answer, error in self.masks.settle():
            if answer.request in self._answers:
                self._end(answer, error)
        ready = {request: answer for request, answer in self._held.items() if answer.mask is not None}
        self.metrics.late_masks.inc(len(self._held) - len(ready))
        if not ready:
            return None
        self._choosing = list(ready)
        slots, masks = [request.slot for request in ready], [answer.mask for answer in ready.values()]
        choice = PendingGrammarSample(self._choosing, self._device.choose(slots, masks, self._mode(ready)))
        for request in ready:
            del self._held[request]
            self.scheduler.go_on(request)
        self._choosing = []
        return choice

    def _send(self, plan: SchedulerOutput) -> InFlightStep | None:
        if plan.empty:
            return None
        started = decoded = None
        if plan.pieces:
            readings = [self._reading(piece) for piece in plan.pieces]
            started = self._device.read(readings, self._mode(piece.request for piece in plan.pieces if piece.last))
            for piece in plan.pieces:
                self._answers[piece.request].unpin(self.features, everything=False)
        if plan.rows:
            decoded = self._device.decode(plan, self._mode(plan.rows))
            self._held |= {row: self._answers[row] for row, held in zip(plan.rows, plan.held, strict=True) if held}
        return InFlightStep(plan, started, decoded)

    def _reading(self, piece: PrefillChunk) -> PrefillRow:
        answer, end = self._answers[piece.request], piece.start + piece.count
        work = answer.work
        if piece.source != piece.request.slot:  # its first piece
            self._enter_own(answer)
        ids, rows = answer.ids(piece.start, end), answer.feature_rows(piece.start, end)
        return PrefillRow(piece, work, ids, rows, piece.request.known, answer.mask if piece.last else None)

    def _enter_own(self, answer: RequestState) -> None:
        """What the device is to know of an answer's own before it samples."""
        request, options = answer.request, answer.work.options
        if has_penalties(options):
            self._device.note(request.slot, answer.ids(0, request.total), request.prompt)
        if options.logit_bias:
            self._device.set_bias(request.slot, options)

    def _mode(self, requests: Iterable[Request]):
        """The least that serves them all."""
        return max((self._answers[request].mode for request in requests), key=MODES.index, default=MODES[0])

    def _take(self, choice: PendingGrammarSample | None) -> None:
        """Hands out the tokens that were chosen, and begins with the masks of the next ones. Waits for the device if it must."""
        if choice is None:
            return
        chosen = _column(jax.device_get(choice.sampled))
        begun = time.perf_counter()
        notify_readers(self._hand_out_all((chosen, i, request) for i, request in enumerate(choice.requests)))
        self._next_masks(choice.requests)
        self.metrics.host.inc(time.perf_counter() - begun)

    def _receive(self, flight: InFlightStep | None) -> None:
        """Hands out what a step has sampled. Waits for the device if it must."""
        if flight is None:
            return
        started, decoded = jax.device_get((flight.started, flight.decoded))
        begun, plan = time.perf_counter(), flight.plan
        columns = _column(started)
        ends = [(columns, i, piece.request) for i, piece in enumerate(plan.pieces) if piece.last]
        rows = [(decoded, i, row) for i, row in enumerate(plan.rows) if not plan.held[i]]
        notify_readers(self._hand_out_all([*ends, *rows]))
        self._next_masks(request for _, _, request in ends)
        self.metrics.steps.inc()
        self.metrics.host.inc(time.perf_counter() - begun)

    def _hand_out_all(self, rows: Iterable[tuple[Sampled, int, Request]]) -> list[RequestHandle]:
        """Rows' tokens to their readers; returns who is to be told."""
        return [job for row in rows if (job := self._hand_out(*row)) is not None]

    def _next_masks(self, requests: Iterable[Request]) -> None:
        """Begins with those of the constrained among them that have not ended."""
        self.masks.make([self._answers[request] for request in requests if request.constrained and request in self._answers])

    def _hand_out(self, sampled: Sampled, row: int, request: Request) -> RequestHandle | None:
        """A row's tokens to its reader, who is returned if he is to be told."""
        answer = self._answers.get(request)
        if answer is None:  # it ended while this step was under way
            return None
        delta = answer.take(row_tokens(sampled, row, answer.work.options.logprobs))
        self.metrics.delivered(answer, len(delta.tokens))
        if delta.finish_reason is not None:
            self._end(answer, delta)
            return None
        return answer.job if answer.job.deliver(delta) else None

    def _end(self, answer: RequestState, outcome: Delta | Exception) -> None:
        """Of an answer, however it comes: all it held is free."""
        self._forget(answer)
        self.scheduler.end(answer.request)
        self.metrics.ended(outcome)
        self.finish_request(answer.job, outcome)

    def _forget(self, answer: RequestState) -> None:
        answer.unpin(self.features, everything=True)
        self._held.pop(answer.request, None)
        del self._answers[answer.request], self._of_job[answer.job]

    def _recover(self, error: Exception, requests: list[Request], previous: InFlightStep | None) -> None:
        """After a step that failed: its requests fail, all others are read again, for the state is lost.

        `previous` is the step before; what it sampled is good unless it failed too.
        """
        failed = list(requests)
        if not failed:
            raise error
        log.error("a step of %d requests failed", len(failed), exc_info=error)
        try:
            self._receive(previous)
        except Exception:
            failed += previous.requests
        for answer in [self._answers[request] for request in dict.fromkeys(failed) if request in self._answers]:
            self._end(answer, error)
        for answer in self._answers.values():
            answer.unpin(self.features, everything=True)
            if answer.request.slot >= 0:
                self.scheduler.put_back(answer.request)
        self.scheduler.restores.clear()
        self.host.clear()
        if self.prefixes is not None:
            self.prefixes.clear()
        self.features.clear()
        self._flight = None
        self._encoding, self._choosing = [], []
        self._held.clear()
        self._device.reset()


def _column(sampled: Sampled) -> Sampled:
    """What was sampled once, [B, ...], as [B, N, ...]."""
    return jax.tree.map(lambda x: x[:, None], sampled)
