"""The gateway's Prometheus metrics. Clients cannot choose the value of any label."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The metrics of one gateway."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "icm_requests", "Answered requests, by route and status.", ["route", "status"], registry=registry
        )
        self.in_flight = Gauge("icm_requests_in_flight", "Requests in progress.", registry=registry)
        self.hits = Counter("icm_adapter_hits", "Requests for tasks with a loaded adapter.", registry=registry)
        self.misses = Counter("icm_adapter_misses", "Requests for tasks without a loaded adapter.", registry=registry)
        self.materialize_seconds = Histogram(
            "icm_materialize_seconds",
            "Time to write an adapter.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.load_seconds = Histogram(
            "icm_load_seconds", "Time for the engine to load an adapter.", buckets=_SECONDS, registry=registry
        )
        self.contexts = Counter(
            "icm_contexts",
            "Requests for a task's context: added (on), too long for the engine (too-long), not supported for this "
            "kind of request (unfit), or made for a task without a usable context (none).",
            ["result"],
            registry=registry,
        )
        self.prefix_asked = Gauge(
            "icm_engine_prefix_tokens",
            "Prompt tokens that the engine looked up in its prefix cache.",
            registry=registry,
        )
        self.prefix_found = Gauge(
            "icm_engine_prefix_tokens_found",
            "Prompt tokens that the engine found in its prefix cache.",
            registry=registry,
        )
        self.unloads = Counter("icm_adapter_unloads", "Adapters that the engine unloaded.", registry=registry)
        self.loaded = Gauge("icm_loaded_adapters", "Adapters loaded in the engine.", registry=registry)
        self.bytes = Gauge("icm_adapter_bytes", "Size of the written adapters in bytes.", registry=registry)
        self.problems = Counter(
            "icm_problems", "Requests that the gateway could not forward, by reason.", ["reason"], registry=registry
        )

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
