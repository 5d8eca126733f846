"""What the engine tells of itself, for Prometheus. Numbers that others hold are read when somebody asks."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from minicpmv46_jax.library import Delta
from serve.engine.engine_client import Cancelled, EngineFull, EngineStopped

PREFIX = "minicpmv46_"
FIRST_S = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60)
TOKEN_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """One engine's; `engine` is read while the numbers are collected."""

    def __init__(self, engine):
        self.registry = CollectorRegistry()
        self._engine = engine

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, what, labels, registry=self.registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, what, registry=self.registry, buckets=buckets)

        self.requests = counter("requests", "Requests that have ended, by how", "outcome")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts taken on")
        self.answer_tokens = counter("answer_tokens", "Tokens of answers handed out")
        self.encoded = counter("encoded_views", "Views that went through the vision tower")
        self.steps = counter("steps", "Steps of the engine: a reading of prompts, a dispatch of decoding, or both")
        self.late_masks = counter("late_masks", "Rows that missed a step because the mask of a constrained answer was not there")
        self.host = counter("host_seconds", "Seconds the engine's thread worked on steps, not waiting for the device")
        self.first = histogram("time_to_first_token_seconds", "From a request's arrival to its first token", FIRST_S)
        self.each = histogram("time_per_output_token_seconds", "Between a stream's tokens, a dispatch's mean", TOKEN_S)
        self.registry.register(self)

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self.registry)

    def delivered(self, answer, tokens: int) -> None:
        """So many tokens more of an answer."""
        now, before = time.monotonic(), answer.told_at
        self.answer_tokens.inc(tokens)
        if before is None:
            self.first.observe(now - answer.job.reserved_at)
        elif tokens:
            self.each.observe((now - before) / tokens)
        answer.told_at = now

    def ended(self, outcome: Delta | Exception) -> None:
        """A request is over."""
        names = {Cancelled: "cancelled", EngineFull: "expired", EngineStopped: "stopped"}
        name = outcome.finish_reason if isinstance(outcome, Delta) else names.get(type(outcome), "failed")
        self.requests.labels(name).inc()

    def collect(self) -> Iterator[Metric]:
        """What the engine's parts hold."""
        engine = self._engine
        scheduler, features = engine.scheduler, engine.features
        gauges = {
            "running": (scheduler.running, "Answers being decoded"),
            "reading": (len(scheduler.reading), "Prompts being read"),
            "waiting": (len(scheduler.waiting), "Requests that wait to be read"),
            "places_taken": (engine.num_reserved, "Requests being prepared, waiting, read or decoded"),
            "pages_free": (engine.pages.free, "Pages of keys and values that nobody holds"),
            "pages_total": (engine.pages.count, "Pages of keys and values"),
            "slots_free": (engine.slots.free, "Slots of gated-delta memory that no request holds"),
            "slots_total": (engine.slots.count, "Slots of gated-delta memory for requests"),
            "prefix_snapshots": (engine.prefixes.snapshots if engine.prefixes else 0, "Beginnings of prompts that are kept"),
            "prefix_host_bytes": (engine.host.used, "Bytes of prefixes in host memory"),
            "feature_rows_used": (features.used, "Rows of picture features that are kept"),
        }
        for name, (value, what) in gauges.items():
            yield GaugeMetricFamily(PREFIX + name, what, value=value)
        counters = {
            "preemptions": (scheduler.preemptions, "Requests put back because pages ran out"),
            "read_tokens": (scheduler.prompt_tokens, "Tokens of prompts that began to be read, again after preemption too"),
            "prefix_hit_tokens": (scheduler.cached_tokens, "Tokens of those that the prefix cache had"),
            "prefix_restored_tokens": (scheduler.restored_tokens, "Tokens of those that came from host memory"),
            "feature_hits": (features.hits, "Views whose features were there"),
            "feature_misses": (features.misses, "Views whose features were not there"),
            "mask_seconds": (engine.masks.seconds, "Seconds spent on masks of constrained answers, in all threads together"),
            "compilations": (engine.compilations.count, "Programs compiled since the engine began to serve"),
        }
        for name, (value, what) in counters.items():
            yield CounterMetricFamily(PREFIX + name, what, value=value)
