"""What the gateway counts, for Prometheus. No label has a value that a client chooses."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The figures of one gateway."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "icm_requests", "Answered requests, by route and status.", ["route", "status"], registry=registry
        )
        self.in_flight = Gauge("icm_requests_in_flight", "Requests that are being answered.", registry=registry)
        self.hits = Counter("icm_adapter_hits", "Requests for a task whose adapter was loaded.", registry=registry)
        self.misses = Counter("icm_adapter_misses", "Requests for a task whose adapter was not.", registry=registry)
        self.materialize_seconds = Histogram(
            "icm_materialize_seconds",
            "Time to write the folder of an adapter.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.load_seconds = Histogram(
            "icm_load_seconds", "Time that the engine takes to load an adapter.", buckets=_SECONDS, registry=registry
        )
        self.contexts = Counter(
            "icm_contexts",
            "Requests that wanted their task's context: it stood before them (on), the engine found that too long, or "
            "the request is of a kind before which none can stand (unfit).",
            ["result"],
            registry=registry,
        )
        self.prefix_asked = Gauge(
            "icm_engine_prefix_tokens",
            "Tokens of prompts that the engine looked up in its prefix cache.",
            registry=registry,
        )
        self.prefix_found = Gauge(
            "icm_engine_prefix_tokens_found",
            "Tokens of prompts that it found there, and did not read.",
            registry=registry,
        )
        self.unloads = Counter("icm_adapter_unloads", "Adapters that the engine unloaded.", registry=registry)
        self.loaded = Gauge("icm_loaded_adapters", "Adapters that the engine has loaded.", registry=registry)
        self.bytes = Gauge("icm_adapter_bytes", "Bytes of the folders of adapters.", registry=registry)
        self.problems = Counter(
            "icm_problems", "Requests that the gateway could not pass on, by reason.", ["reason"], registry=registry
        )

    def text(self) -> bytes:
        """Return all figures as Prometheus reads them."""
        return generate_latest(self._registry)
