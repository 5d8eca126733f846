"""Continuous batching: one thread schedules steps, sends them to the device, and delivers the sampled tokens.

The thread sends step n + 1 before it reads the tokens of step n, so the device computes while the host turns
tokens into text. A step is at most one call of the vision tower, one prefill and one dispatch of decode, in
this order. This bounds the time between two tokens of a stream, whatever else arrives.

For rows with structured output, a dispatch only computes logits, which need no grammar mask. Meanwhile
threads compute the masks. Then the held logits are sampled, and the next dispatch is sent before the host
reads that token. A step waits for masks a millisecond at most; a row whose mask is late skips the step.

Errors are contained in three rings. An error of one row on the host fails that request, and all else goes on.
An error of a call to the device fails the requests of that call; all state is made anew, and the others
prefill again. Only if new state cannot be made does the engine end, with EngineFailed for all requests.
"""

import dataclasses
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

from kernels_pallas.page_size import PAGE
from minicpmv46_jax import MiniCPMV
from minicpmv46_jax.generation.decoding import has_penalties
from minicpmv46_jax.generation.generate import row_tokens
from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.generation.sampling import Sampled, SamplingMode
from minicpmv46_jax.library import Delta
from minicpmv46_jax.processing import Inputs
from serve.engine.encoder_cache import EncoderCache
from serve.engine.engine_client import (
    Cancelled,
    EngineClient,
    EngineFull,
    RequestHandle,
    RequestRejected,
    notify_readers,
)
from serve.engine.grammar_masks import GrammarMasks
from serve.engine.host_prefix_cache import HostPrefixCache
from serve.engine.metrics import Metrics
from serve.engine.model_runner import ModelRunner, PrefillRow
from serve.engine.offload import OffloadedPrefix
from serve.engine.page_pool import PagePool, SlotPool
from serve.engine.prefix_cache import EvictedPrefix, PrefixCache
from serve.engine.program_shapes import MODES
from serve.engine.request import EngineRequest, MultimodalItem, prepare_request
from serve.engine.request_state import RequestState
from serve.engine.scheduler import PrefillChunk, Scheduler, SchedulerOutput, Stage, StepLimits
from serve.runtime.program_cache import CompilationCounter

log = logging.getLogger("serve")

T = TypeVar("T")

MAX_WAITING = 512  # requests
PREPARE_THREADS = 4  # hashing and packing release the GIL
MAX_OFFLOADS = 8  # prefixes on their way to the host at once; each holds 43 MB or more of device memory until it arrives
RESET_PAUSES_S = (0.1, 1.0)  # between attempts to make new state; programs still running may hold the memory


@dataclasses.dataclass(frozen=True)
class QueuePolicy:
    """Limits of the queue and of host memory.

    Attributes:
      max_waiting: requests that may be prepared or waiting, beyond those that run.
      max_wait_s: seconds that a request may wait before it starts; None sets no limit.
      prefix_host_bytes: host memory for prefixes evicted from the device.
    """

    max_waiting: int = MAX_WAITING
    max_wait_s: float | None = None
    prefix_host_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class InFlightStep:
    """A step that was sent, and its samples: first tokens of prompts, and tokens of decoded rows."""

    output: SchedulerOutput[RequestState]
    first_tokens: Sampled | None
    decoded: Sampled | None

    @property
    def only_prefills(self) -> bool:
        """True if requests start in it and none decodes."""
        return self.first_tokens is not None and self.decoded is None

    @property
    def requests(self) -> list[RequestState]:
        """All requests of the step."""
        return [*(chunk.request for chunk in self.output.prefill_chunks), *self.output.rows]


@dataclasses.dataclass(frozen=True)
class PendingOffload:
    """A prefix on its way to host memory."""

    block_hash: bytes
    prefix: OffloadedPrefix
    finished: Future


@dataclasses.dataclass(frozen=True)
class PendingGrammarSample:
    """Tokens sampled from held logits, on their way to the host."""

    requests: list[RequestState]
    sampled: Sampled


class Engine(EngineClient):
    """Serves many requests at once with continuous batching.

    Args:
      model: its detokenizer is used here.
      runner: compiled, with the model's parameters loaded.
      policy: limits of the queue.
    """

    def __init__(self, model: MiniCPMV, runner: ModelRunner, policy: QueuePolicy | None = None):
        self.policy = policy or QueuePolicy()
        self.plan = plan = runner.plan
        super().__init__(plan.max_running + self.policy.max_waiting)
        self._model, self._runner = model, runner
        self.num_programs = runner.num_programs
        self.compilations = CompilationCounter()
        self.encoder_cache = EncoderCache(plan.encoder_cache_rows)
        self.pages, self.slots = PagePool(plan.num_pages), SlotPool(plan.max_running)
        self.snapshots = SlotPool(plan.num_snapshots, first=plan.max_running)
        self.prefix_cache = PrefixCache(self.pages, self.snapshots, self._offload) if plan.num_snapshots else None
        self.host_cache = HostPrefixCache(self.policy.prefix_host_bytes)
        limits = StepLimits(*plan.buckets.prefill_shapes[-1], plan.buckets.decode_steps)
        host_cache = self.host_cache if plan.num_snapshots else None
        self.scheduler: Scheduler[RequestState] = Scheduler(limits, self.pages, self.slots, self.prefix_cache, host_cache)
        self.metrics = Metrics(self)
        self._states: dict[RequestHandle, RequestState] = {}
        self._inbox: deque[tuple[RequestHandle, EngineRequest]] = deque()
        self._aborted: deque[RequestHandle] = deque()
        self._in_flight: InFlightStep | None = None
        # The requests that fail if the current call raises; None if no call is known to be at fault.
        self._concerned: Sequence[RequestState] | None = None
        self._awaiting_mask: list[RequestState] = []  # the device holds logits of these
        self.masks = GrammarMasks()
        self._offloads: list[PendingOffload] = []
        self._prepare_pool = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="prepare")
        self._offload_thread = ThreadPoolExecutor(1, thread_name_prefix="offload")  # waits for the device
        self.start()

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its output may have."""
        return self.plan.max_model_len

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops the engine and its threads; see `EngineClient.close`."""
        super().close(timeout_s)
        self._prepare_pool.shutdown(wait=False, cancel_futures=True)
        self._offload_thread.shutdown(wait=False, cancel_futures=True)
        self.masks.close()

    def add_request(self, handle: RequestHandle, inputs: Inputs, options: GenerationOptions, cache_salt: str) -> None:
        """Takes over a request: checks it now and prepares it in a thread pool.

        Raises:
          RequestRejected: the prompt is too long, or a view too large.
          EngineStopped: the engine has stopped.
        """
        self._check(inputs)
        with self.changed:
            if self.stopping:
                raise self.stopped_error()
        side = self._model.config.vision.positions_per_side
        preparation = self._prepare_pool.submit(prepare_request, inputs, options, side, cache_salt)
        preparation.add_done_callback(functools.partial(self._add_prepared, handle))

    def abort_request(self, handle: RequestHandle) -> None:
        """Aborts a submitted request at the next step."""
        with self.changed:
            self._aborted.append(handle)
            self.changed.notify_all()

    def _check(self, inputs: Inputs) -> None:
        total, limit = len(inputs.token_ids), self.max_model_len
        if total >= limit:
            raise RequestRejected(
                f"the prompt has {total} tokens, and this server holds {limit}, at least one of them the answer's"
            )
        for view in inputs.views:
            if self._runner.shapes.encoder_shape([len(view.pixels)]) is None:
                longest = self.plan.buckets.encoder_shapes[-1].longest_view
                h, w = view.grid
                raise RequestRejected(f"a picture has a view of {h} x {w} patches, and this server encodes {longest} at most")

    def _add_prepared(self, handle: RequestHandle, preparation: Future) -> None:
        """Passes a prepared request to the engine's thread, or finishes it if its preparation failed."""
        error = self.stopped_error() if preparation.cancelled() else preparation.exception()
        if error is None:
            with self.changed:
                if not self.stopping:
                    self._inbox.append((handle, preparation.result()))
                    self.changed.notify_all()
                    return
            error = self.stopped_error()
        self.finish_request(handle, error)

    def run(self) -> None:
        """Runs steps until the engine stops."""
        while self._wait_for_work():
            self._concerned = None
            try:
                self._drain_inbox()
                self._step()
            except BaseException as error:
                self._recover(error)

    def _wait_for_work(self) -> bool:
        """Waits until there is something to do; returns False when the engine stops."""
        with self.changed:
            self.changed.wait_for(lambda: self._inbox or self._aborted or self._states or self._in_flight or self.stopping)
            return not self.stopping

    def _drain_inbox(self) -> None:
        """Takes over new and aborted requests."""
        while self._inbox:
            self._start(*self._inbox.popleft())
        while self._aborted:
            state = self._states.get(self._aborted.popleft())
            if state is not None:  # else it has finished, or is still being prepared
                self._finish(state, Cancelled())

    def _start(self, handle: RequestHandle, request: EngineRequest) -> None:
        """Adds a request to the scheduler; an error fails this request alone."""
        if handle.cancelled:
            self.finish_request(handle, Cancelled())
            return
        try:
            state = RequestState(handle, request, self.max_model_len, self._model.detokenizer)
            if self.policy.max_wait_s is not None:
                state.deadline = handle.reserved_at + self.policy.max_wait_s
            self._states[handle] = state
            self.scheduler.add(state)
        except BaseException as error:
            log.error("a request cannot be started", exc_info=error)
            if handle in self._states:
                self._finish(self._states[handle], error)
            else:
                self.finish_request(handle, error)
            return
        self.metrics.accepted(len(request.token_ids))

    def _step(self) -> None:
        """Sends one step and delivers the tokens of the one before."""
        begun = time.perf_counter()
        self._keep_offloaded()
        self._admit()
        if self._in_flight is not None and self._in_flight.only_prefills and not self.scheduler.prefilling:
            # First tokens are delivered before the next step is sent: the device has no work queued that
            # would hide the wait.
            self._collect_in_flight()
        self._restore()
        self._encode()
        grammar_sample = self._sample_held()
        sent = self._dispatch(self._schedule())
        self.metrics.worked(time.perf_counter() - begun)
        self._collect_samples(grammar_sample)
        self._collect_in_flight()
        self._in_flight = sent

    def _admit(self) -> None:
        """Starts waiting requests that fit, and finishes those that have expired."""
        for state in self._call_scheduler(self.scheduler.admit, time.monotonic()):
            self._finish(state, EngineFull(f"it waited {self.policy.max_wait_s:g} seconds without beginning"))

    def _call_scheduler(self, method: Callable[..., T], *args: Any) -> T:
        """Calls a method of the scheduler; an error concerns the request that it worked on, if any."""
        self._concerned = None
        try:
            return method(*args)
        except BaseException:
            if self.scheduler.current is not None:
                self._concerned = [self.scheduler.current]
            raise

    def _schedule(self) -> SchedulerOutput[RequestState]:
        output = self._call_scheduler(self.scheduler.schedule)
        for state in output.preempted:
            state.unpin(self.encoder_cache, all_items=True)
            self._drop_held(state)
        return output

    def _offload(self, evicted: EvictedPrefix) -> None:
        """Starts copying an evicted prefix to the host, if that is worth it; an error only loses the prefix.

        A prefix that one step can prefill is dropped: prefill is faster than a copy to the host and back. On
        an H200 the prefill of 512 tokens takes 3.3 ms, and copying 26 MB takes 4.5 ms and 5.3 ms.
        """
        is_long = len(evicted.pages) * PAGE >= self.scheduler.limits.max_tokens
        if not self.policy.prefix_host_bytes or not is_long or len(self._offloads) >= MAX_OFFLOADS:
            return
        try:
            prefix = self._runner.offload(evicted.pages, evicted.snapshot_slot)
            self._offloads.append(PendingOffload(evicted.block_hash, prefix, self._offload_thread.submit(prefix.finish)))
        except BaseException as error:
            log.warning("an evicted prefix is not kept in host memory", exc_info=error)

    def _keep_offloaded(self) -> None:
        """Adds prefixes that have arrived in host memory to its cache; drops those whose copy failed."""
        arrived = [offload for offload in self._offloads if offload.finished.done()]
        if not arrived:
            return
        self._offloads = [offload for offload in self._offloads if offload not in arrived]
        for offload in arrived:
            if (error := offload.finished.exception()) is None:
                self.host_cache.put(offload.block_hash, offload.prefix)
            else:
                log.warning("an evicted prefix is not kept in host memory", exc_info=error)

    def _restore(self) -> None:
        """Sends the copies of prefixes that newly admitted requests start from.

        An error fails no request: without the lost prefixes they prefill all of their prompts.
        """
        self._concerned = ()
        restores, self.scheduler.restores = self.scheduler.restores, []
        for restore in restores:
            self._runner.restore(restore.prefix, restore.first_page, restore.pages, restore.snapshot_slot)

    def _encode(self) -> None:
        """Sends one call of the vision tower for the items needed first; all have one downsample mode."""
        items: list[MultimodalItem] = []
        rows: list[np.ndarray] = []
        encoding: list[RequestState] = []
        for state in sorted(self.scheduler.prefilling, key=lambda state: state.rank):
            self._concerned = [state]
            for item in state.unencoded_items():
                entry = self.encoder_cache.find(item.mm_hash)
                if entry is None and self._fits_call(items, item):
                    entry = self.encoder_cache.reserve(item.mm_hash, item.packed_view.num_tokens)
                    if entry is not None:
                        items.append(item)
                        rows.append(entry.rows)
                        encoding.append(state)
                if entry is None:
                    break
                state.attach(item, entry)
            state.update_ready_tokens()
        if items:
            self._concerned = encoding
            self._runner.encode([item.packed_view for item in items], rows)
            self.metrics.encoded_views(len(items))

    def _fits_call(self, items: list[MultimodalItem], item: MultimodalItem) -> bool:
        """Returns whether the item may join the call of the vision tower."""
        if items and items[0].packed_view.downsample_mode != item.packed_view.downsample_mode:
            return False
        return self._runner.shapes.encoder_shape([len(other.packed_view.patches) for other in (*items, item)]) is not None

    def _sample_held(self) -> PendingGrammarSample | None:
        """Samples the held logits whose grammar mask is ready."""
        self._concerned = None
        for state, error in self.masks.collect():
            if state.stage is not Stage.FINISHED:
                self._finish(state, error)
        ready = [state for state in self._awaiting_mask if state.mask is not None]
        self.metrics.missed_masks(len(self._awaiting_mask) - len(ready))
        if not ready:
            return None
        self._concerned = ready
        slots, masks = [state.slot for state in ready], [state.mask for state in ready]
        sample = PendingGrammarSample(ready, self._runner.sample_held(slots, masks, _sampling_mode(ready)))
        for state in ready:
            self._drop_held(state)
            self.scheduler.mark_sampled(state)
        return sample

    def _drop_held(self, state: RequestState) -> None:
        if state in self._awaiting_mask:
            self._awaiting_mask.remove(state)

    def _dispatch(self, output: SchedulerOutput[RequestState]) -> InFlightStep | None:
        """Sends a step to the device."""
        if output.is_empty:
            return None
        first_tokens = decoded = None
        if chunks := output.prefill_chunks:
            rows = [self._prefill_row(chunk) for chunk in chunks]
            self._concerned = [chunk.request for chunk in chunks]
            first_tokens = self._runner.prefill(rows, _sampling_mode(chunk.request for chunk in chunks if chunk.is_last))
            for chunk in chunks:
                chunk.request.unpin(self.encoder_cache, all_items=False)
        if output.rows:
            self._concerned = output.rows
            decoded = self._runner.decode(output, _sampling_mode(output.rows))
            self._awaiting_mask += [row for row, awaits in zip(output.rows, output.awaiting_mask, strict=True) if awaits]
        return InFlightStep(output, first_tokens, decoded)

    def _prefill_row(self, chunk: PrefillChunk[RequestState]) -> PrefillRow:
        state, end = chunk.request, chunk.start + chunk.num_tokens
        self._concerned = [state]
        if chunk.source_slot != state.slot:  # the request's first chunk
            self._set_sampling_state(state)
        token_ids, rows = state.token_ids(chunk.start, end), state.encoder_rows(chunk.start, end)
        mask = state.mask if chunk.is_last else None
        return PrefillRow(chunk, state.request, token_ids, rows, state.num_output_tokens, mask)

    def _set_sampling_state(self, state: RequestState) -> None:
        """Sets the slot's token history and logit biases, where the request's options use them."""
        options = state.request.options
        if has_penalties(options):
            self._runner.record_prompt(state.slot, state.token_ids(0, state.num_tokens), state.num_prompt_tokens)
        if options.logit_bias:
            self._runner.set_bias(state.slot, options)

    def _collect_samples(self, sample: PendingGrammarSample | None) -> None:
        """Delivers tokens sampled from held logits and starts their next masks. Waits for the device."""
        if sample is None:
            return
        self._concerned = sample.requests
        sampled = _add_step_axis(jax.device_get(sample.sampled))
        begun = time.perf_counter()
        self._emit_rows((sampled, i, state) for i, state in enumerate(sample.requests))
        self._submit_masks(sample.requests)
        self.metrics.worked(time.perf_counter() - begun)

    def _collect_in_flight(self) -> None:
        """Delivers the tokens of the step in flight, if there is one. Waits for the device."""
        step, self._in_flight = self._in_flight, None
        if step is not None:
            self._collect_step(step)

    def _collect_step(self, step: InFlightStep) -> None:
        self._concerned = step.requests
        first_tokens, decoded = jax.device_get((step.first_tokens, step.decoded))
        begun, output = time.perf_counter(), step.output
        first_tokens = _add_step_axis(first_tokens)
        started = [(first_tokens, i, chunk.request) for i, chunk in enumerate(output.prefill_chunks) if chunk.is_last]
        continued = [(decoded, i, row) for i, row in enumerate(output.rows) if not output.awaiting_mask[i]]
        self._emit_rows([*started, *continued])
        self._submit_masks(state for _, _, state in started)
        self.metrics.stepped(time.perf_counter() - begun)

    def _emit_rows(self, rows: Iterable[tuple[Sampled, int, RequestState]]) -> None:
        """Delivers the tokens of rows and wakes their readers."""
        notify_readers([handle for row in rows if (handle := self._emit_tokens(*row)) is not None])

    def _submit_masks(self, states: Iterable[RequestState]) -> None:
        """Starts the next grammar masks of the requests that need one; an error fails these alone."""
        states = [state for state in states if state.uses_grammar and state.stage is not Stage.FINISHED]
        try:
            self.masks.submit(states)
        except BaseException as error:
            log.error("grammar masks of %d requests failed", len(states), exc_info=error)
            for state in states:
                self._finish(state, error)

    def _emit_tokens(self, sampled: Sampled, row: int, state: RequestState) -> RequestHandle | None:
        """Delivers a row's tokens; returns the handle if its reader must be woken.

        An error fails this request alone.
        """
        if state.stage is Stage.FINISHED:  # it finished while this step was under way
            return None
        try:
            delta = state.add_tokens(row_tokens(sampled, row, state.request.options.logprobs))
            self.metrics.delivered(state, len(delta.tokens))
            if delta.finish_reason is None:
                return state.handle if state.handle.deliver(delta) else None
        except BaseException as error:
            log.error("the output of a request failed", exc_info=error)
            delta = error
        self._finish(state, delta)
        return None

    def _finish(self, state: RequestState, outcome: Delta | BaseException) -> None:
        """Finishes a request and frees its slot, pages and encoder cache entries."""
        del self._states[state.handle]
        try:
            state.unpin(self.encoder_cache, all_items=True)
            self._drop_held(state)
            self.scheduler.finish(state)
        finally:
            self.metrics.ended(outcome)
            self.finish_request(state.handle, outcome)

    def _recover(self, error: BaseException) -> None:
        """Fails the requests of a failed call; all others prefill again, because the state is lost.

        Without a call at fault, the error fails all running requests, or all requests if none runs: an error
        that fails none might come again for ever. A failed restore fails none, because the prefixes that it
        needs are dropped.
        """
        failed = self._requests_at_fault()
        log.error("a step of %d requests failed", len(failed), exc_info=error)
        step = self._in_flight
        try:
            self._collect_in_flight()  # tokens of the step before it are still delivered
        except BaseException:
            assert step is not None  # collecting no step cannot fail
            failed += step.requests
        failed = [state for state in dict.fromkeys(failed) if self._states.pop(state.handle, None) is not None]
        for state in failed:
            state.stage = Stage.FINISHED
        for state in self._states.values():
            state.forget_items()
        self._awaiting_mask = []
        self.scheduler.reset(self._states.values())
        self.encoder_cache.clear()
        self._reset_device()
        for state in failed:
            self.metrics.ended(error)
            self.finish_request(state.handle, error)

    def _requests_at_fault(self) -> list[RequestState]:
        """Returns the requests that fail because of an error in the current step."""
        if self._concerned is not None:
            return list(self._concerned)
        states = list(self._states.values())
        return [state for state in states if state.slot >= 0] or states

    def _reset_device(self) -> None:
        """Makes new device state, after pauses if that fails at first."""
        for pause_s in RESET_PAUSES_S:
            try:
                self._runner.reset()
                return
            except BaseException:
                log.exception("new state cannot be made; trying again in %g s", pause_s)
            time.sleep(pause_s)
        self._runner.reset()


def _sampling_mode(states: Iterable[RequestState]) -> SamplingMode:
    """Returns the cheapest sampling mode that serves all of these requests."""
    return MODES[max((MODES.index(state.mode) for state in states), default=0)]


def _add_step_axis(sampled: Sampled | None) -> Sampled | None:
    """Adds a step axis: samples [B, ...] become [B, 1, ...]."""
    return jax.tree.map(lambda x: x[:, None], sampled)
