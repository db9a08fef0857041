"""What a context and an adapter are worth for a task: losses of samples that neither of them has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from icmlora.base_models.examples.examples import spread

Served = Literal["neither", "context", "adapter", "both"]
Sample = TypeVar("Sample")

LEFT_OUT = 4
"""Samples that tell; of fewer than twice as many none are left out."""
_WITHOUT_CONTEXT: tuple[Served, ...] = ("neither", "adapter")
_BY_COST: tuple[Served, ...] = (*_WITHOUT_CONTEXT, "context", "both")
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
    def losses(self) -> dict[str, float]:
        """All of them by what is served."""
        return {"neither": self.neither, "context": self.context, "adapter": self.adapter, "both": self.both}

    @property
    def recommended(self) -> Served:
        """What to serve: the best, or what is hardly worse and costs less at every request.

        A context that is no help by itself is not among them: what it adds to an adapter is chance, on a few samples.
        """
        candidates = _BY_COST if self.context < self.neither else _WITHOUT_CONTEXT
        losses = {name: self.losses[name] for name in candidates}
        best = min(losses.values())
        allowed = best + _HARDLY * (self.neither - best)
        return next(name for name, nats in losses.items() if nats <= allowed)

    @property
    def recommends_context(self) -> bool:
        """Whether the context is to be served, alone or with the adapter."""
        return self.recommended not in _WITHOUT_CONTEXT


def left_out(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Split samples into those that are left out, from all over them, and the others."""
    if len(samples) < 2 * LEFT_OUT:
        return [], list(samples)
    places = set(spread(range(len(samples)), LEFT_OUT))
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for place, sample in enumerate(samples):
        parts[place not in places].append(sample)
    return parts
