"""Measurements on held-out examples, and the figures to print of them. Never imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from registry.manifests import Measurement, relative_error
from registry.names import LOAD_IN, NLL

__all__ = ["MAX_TOKENS", "MetricResult", "relative_error"]

MAX_TOKENS = 256
"""Tokens scored in each text, unless the caller asks for another number."""


@dataclass(frozen=True)
class MetricResult:
    """A metric, and the number of predictions that it was measured on."""

    metric: str  # its name, such as "nats per token" or "accuracy"
    value: float
    count: int  # predictions that were scored
    utf8_bytes: int = 1  # of the text that was scored
    others: Mapping[str, float] = field(default_factory=dict)  # further figures, by name

    @classmethod
    def of(cls, stored: Measurement) -> MetricResult:
        """Return the result of a measurement in the store."""
        return cls(stored.metric, stored.value, stored.count, stored.utf8_bytes, stored.others)

    @property
    def figures(self) -> Mapping[str, float]:
        """The figures to print, by name: of a language model also perplexity and bits per byte."""
        if self.metric != NLL:
            return {self.metric: self.value, **self.others}
        # Perplexity is infinite where a float cannot hold it.
        perplexity = math.exp(self.value) if self.value < 700 else math.inf
        bits = self.value * self.count / math.log(2) / self.utf8_bytes
        return {self.metric: self.value, "perplexity": perplexity, "bits per byte": bits, **self.others}


def gain_text(gain: float | None, precision: str | None, digits: int = 3, missing: str = "-") -> str:
    """Return a retained gain such as "0.951", or "0.951 nf4"."""
    return missing if gain is None else f"{gain:.{digits}f}{f' {precision}' if precision in LOAD_IN else ''}"


def measured_in(precisions: Iterable[str | None]) -> str:
    """Return the precisions to print after figures, if a base model was loaded in few bits; else nothing."""
    found = sorted({precision for precision in precisions if precision is not None})
    return f" {', '.join(found)}" if any(precision in LOAD_IN for precision in found) else ""
