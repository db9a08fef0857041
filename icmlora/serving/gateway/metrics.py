"""The gateway's Prometheus metrics. Clients cannot choose the value of any label."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The metrics of one gateway."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry)
        seconds = partial(Histogram, buckets=_SECONDS, registry=self._registry)
        self.requests = counter("icm_requests", "Answered requests, by route and status.", ["route", "status"])
        self.problems = counter("icm_problems", "Requests that the gateway could not forward, by reason.", ["reason"])
        self.in_flight = gauge("icm_requests_in_flight", "Requests in progress.")
        self.hits = counter("icm_adapter_hits", "Requests for tasks with a loaded adapter.")
        self.misses = counter("icm_adapter_misses", "Requests for tasks without a loaded adapter.")
        self.materialize_seconds = seconds("icm_materialize_seconds", "Time to write an adapter.")
        self.load_seconds = seconds("icm_load_seconds", "Time for the engine to load an adapter.")
        self.contexts = counter(
            "icm_contexts",
            "Requests for a task's context: added (on), too long for the engine (too-long), not supported for this "
            "kind of request (unfit), or made for a task without a usable context (none).",
            ["result"],
        )
        self.prefix_asked = gauge(
            "icm_engine_prefix_tokens", "Prompt tokens that the engine looked up in its prefix cache."
        )
        self.prefix_found = gauge(
            "icm_engine_prefix_tokens_found", "Prompt tokens that the engine found in its prefix cache."
        )
        self.unloads = counter("icm_adapter_unloads", "Adapters that the engine unloaded.")
        self.loaded = gauge("icm_loaded_adapters", "Adapters loaded in the engine.")
        self.bytes = gauge("icm_adapter_bytes", "Size of the written adapters in bytes.")

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
