"""What a context and an adapter are worth for a task: losses of samples that neither of them has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Served = Literal["neither", "context", "adapter", "both"]
Sample = TypeVar("Sample")

LEFT_OUT = 4
"""Samples that tell; of fewer than twice as many none are left out."""
_HARDLY = 0.02  # share of what the best brings, that a cheaper one may bring less


@dataclass(frozen=True)
class Guard:
    """Losses in nats per token."""

    neither: float
    context: float
    adapter: float
    both: float
    samples: int  # that were left out

    @property
    def recommended(self) -> Served:
        """What to serve: the best, or what is hardly worse and costs less at every request."""
        by_cost: tuple[tuple[Served, float], ...] = (
            ("neither", self.neither),
            ("adapter", self.adapter),
            ("context", self.context),
            ("both", self.both),
        )
        best = min(nats for _, nats in by_cost)
        allowed = best + _HARDLY * (self.neither - best)
        return next(name for name, nats in by_cost if nats <= allowed)


def left_out(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Split samples into those that are left out, from all over them, and the others."""
    if len(samples) < 2 * LEFT_OUT:
        return [], list(samples)
    places = {len(samples) * number // LEFT_OUT for number in range(LEFT_OUT)}
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for place, sample in enumerate(samples):
        parts[place not in places].append(sample)
    return parts
