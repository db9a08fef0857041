"""What was measured of a source on held-out examples, and the figures to print of it. Never imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from registry.names import NLL
from registry.records import EvaluationRecord, relative_error

__all__ = ["MAX_TOKENS", "MetricResult", "relative_error"]

MAX_TOKENS = 256
"""Tokens scored in each text, unless the caller asks for another number."""


@dataclass(frozen=True)
class MetricResult:
    """What a modality measured: the metric, and how much it was measured on."""

    metric: str  # its name, such as "nats per token" or "accuracy"
    value: float
    count: int  # predictions that were scored
    utf8_bytes: int = 1  # of the text that was scored
    others: Mapping[str, float] = field(default_factory=dict)  # further figures, by name

    @classmethod
    def of(cls, row: EvaluationRecord) -> MetricResult:
        """Return what a measurement in the store says."""
        return cls(row.metric, row.value, row.count, row.utf8_bytes, row.others)

    @property
    def figures(self) -> Mapping[str, float]:
        """What to print of it, by name: of a language model also perplexity and bits per byte."""
        if self.metric != NLL:
            return {self.metric: self.value, **self.others}
        # Perplexity is infinite where a float cannot hold it.
        perplexity = math.exp(self.value) if self.value < 700 else math.inf
        bits = self.value * self.count / math.log(2) / self.utf8_bytes
        return {self.metric: self.value, "perplexity": perplexity, "bits per byte": bits, **self.others}
