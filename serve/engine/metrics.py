"""Prometheus metrics of the engine.

Numbers that other objects hold are read when the metrics are collected.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from minicpmv46_jax.library import Delta
from serve.engine.engine_client import Cancelled, EngineFull, EngineStopped

log = logging.getLogger("serve")

PREFIX = "minicpmv46_"
FIRST_TOKEN_BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60)
OUTPUT_TOKEN_BUCKETS_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)


def _never_fails(method: Callable[..., None]) -> Callable[..., None]:
    """Decorates a method of `Metrics`: an error in it is logged and loses the count, nothing else.

    Only a method's first error is logged, because some methods run for each row of each step.
    """

    @functools.wraps(method)
    def guarded(self: "Metrics", *args) -> None:
        try:
            method(self, *args)
        except BaseException as error:
            if method not in self._failing:
                self._failing.add(method)
                log.error("a metric cannot be counted", exc_info=error)

    return guarded


class Metrics:
    """Metrics of one engine. Methods that count never raise."""

    def __init__(self, engine):
        self.registry = CollectorRegistry()
        self._engine = engine
        self._failing: set[Callable] = set()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, registry=self.registry, buckets=buckets)

        self.requests = counter("requests", "Finished requests, by outcome", "outcome")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted requests")
        self.answer_tokens = counter("answer_tokens", "Output tokens delivered")
        self.encoded = counter("encoded_views", "Image slices encoded by the vision tower")
        self.steps = counter("steps", "Engine steps: a prefill, a dispatch of decode, or both")
        self.late_masks = counter("late_masks", "Rows that skipped a step because their grammar mask was not ready")
        self.host = counter("host_seconds", "Seconds the engine thread worked on steps, without waiting for the device")
        self.first = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", FIRST_TOKEN_BUCKETS_S
        )
        self.each = histogram(
            "time_per_output_token_seconds", "Between a stream's tokens, mean of a dispatch", OUTPUT_TOKEN_BUCKETS_S
        )
        self.registry.register(self)

    def text(self) -> bytes:
        """Returns all metrics in the Prometheus text format."""
        return generate_latest(self.registry)

    @_never_fails
    def accepted(self, num_prompt_tokens: int) -> None:
        """Counts the prompt of a request that the engine has taken over."""
        self.prompt_tokens.inc(num_prompt_tokens)

    @_never_fails
    def encoded_views(self, number: int) -> None:
        """Counts views sent to the vision tower."""
        self.encoded.inc(number)

    @_never_fails
    def missed_masks(self, number: int) -> None:
        """Counts rows that skip a step because their grammar mask is not ready."""
        self.late_masks.inc(number)

    @_never_fails
    def worked(self, seconds: float) -> None:
        """Counts time of the engine's thread."""
        self.host.inc(seconds)

    @_never_fails
    def stepped(self, seconds: float) -> None:
        """Counts a step whose tokens were delivered, and the time that this took."""
        self.steps.inc()
        self.host.inc(seconds)

    @_never_fails
    def delivered(self, state, num_tokens: int) -> None:
        """Counts output tokens delivered to a request (`RequestState`)."""
        now, before = time.monotonic(), state.last_token_time
        self.answer_tokens.inc(num_tokens)
        if before is None:
            self.first.observe(now - state.handle.reserved_at)
        elif num_tokens:
            self.each.observe((now - before) / num_tokens)
        state.last_token_time = now

    @_never_fails
    def ended(self, outcome: Delta | BaseException) -> None:
        """Counts a finished request."""
        names = {Cancelled: "cancelled", EngineFull: "expired", EngineStopped: "stopped"}
        name = outcome.finish_reason if isinstance(outcome, Delta) else names.get(type(outcome), "failed")
        self.requests.labels(name).inc()

    def collect(self) -> Iterator[Metric]:
        """Yields the numbers that the engine's parts hold."""
        engine = self._engine
        scheduler, encoder_cache = engine.scheduler, engine.encoder_cache
        num_snapshots = engine.prefix_cache.num_snapshots if engine.prefix_cache else 0
        gauges = {
            "running": (scheduler.num_decoding, "Requests being decoded"),
            "reading": (len(scheduler.prefilling), "Requests being prefilled"),
            "waiting": (len(scheduler.waiting), "Requests waiting for prefill"),
            "places_taken": (engine.num_reserved, "Requests being prepared, waiting or running"),
            "pages_free": (engine.pages.num_free, "Free pages of keys and values"),
            "pages_total": (engine.pages.count, "Pages of keys and values"),
            "slots_free": (engine.slots.num_free, "Free slots of recurrent and conv state"),
            "slots_total": (engine.slots.count, "Slots of recurrent and conv state for requests"),
            "prefix_snapshots": (num_snapshots, "Prompt prefixes cached on the device"),
            "prefix_host_bytes": (engine.host_cache.used_bytes, "Bytes of prefixes in host memory"),
            "feature_rows_used": (encoder_cache.num_used, "Rows of the encoder cache in use"),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        counters = {
            "preemptions": (scheduler.preemptions, "Requests preempted because pages ran out"),
            "read_tokens": (scheduler.prompt_tokens, "Tokens of admitted prompts, again after a preemption"),
            "prefix_hit_tokens": (scheduler.cached_tokens, "Tokens of these found in the prefix cache"),
            "prefix_restored_tokens": (scheduler.restored_tokens, "Tokens of these restored from host memory"),
            "feature_hits": (encoder_cache.hits, "Image slices found in the encoder cache"),
            "feature_misses": (encoder_cache.misses, "Image slices not found in the encoder cache"),
            "mask_seconds": (engine.masks.seconds, "Seconds spent on grammar masks, summed over all threads"),
            "compilations": (engine.compilations.count, "Programs compiled since the engine started"),
        }
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(PREFIX + name, text, value=value)
