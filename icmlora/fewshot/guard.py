"""Measure what a context and an adapter gain on a task: losses on samples that neither has seen.

8 samples or more    four are held out of both
2 to 7               leave-one-out: each is read after the others, by the base model or with an existing adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from icmlora.base_models.examples.examples import spread
from icmlora.errors import DataError
from icmlora.fewshot.context_choice import estimate
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.base_models.modality import Score
    from icmlora.fewshot.context_choice import ChosenContext, ContextScorer

Served = Literal["neither", "context", "adapter", "both"]
Sample = TypeVar("Sample")

LEFT_OUT = 4
"""Size of the held-out set; with fewer than twice as many samples none are held out."""
_WITHOUT_CONTEXT: tuple[Served, ...] = ("neither", "adapter")
_BY_COST: tuple[Served, ...] = (*_WITHOUT_CONTEXT, "context", "both")
_HARDLY = 0.02  # extra loss allowed for a cheaper choice, as a share of the best one's gain or loss


@dataclass(frozen=True)
class AblationReport:
    """Losses in nats per token, and the choice that follows from them."""

    neither: float
    context: float
    adapter: float | None  # None where no adapter was made without the held-out samples
    both: float | None
    samples: int  # number of samples measured
    leave_one_out: bool = False  # whether this is leave-one-out: each was read after the others
    least: float = 0.0  # minimum gain of the context by itself, in nats per token

    @classmethod
    def of(
        cls, bare: ContextAblation | None, adapted: ContextAblation | None, *, leave_one_out: bool
    ) -> AblationReport | None:
        """Combine the losses of the base model with and without an adapter; None if there are none.

        Where only the base model was measured, the context's gain has to exceed its standard error.
        """
        if bare is None:
            return None
        if adapted is None:
            return cls(bare.without, bare.with_context, None, None, bare.samples, leave_one_out, bare.error)
        both = adapted.with_context
        return cls(bare.without, bare.with_context, adapted.without, both, bare.samples, leave_one_out)

    @property
    def losses(self) -> dict[Served, float]:
        """Measured losses, by choice."""
        every: dict[Served, float | None] = {
            "neither": self.neither,
            "context": self.context,
            "adapter": self.adapter,
            "both": self.both,
        }
        return {name: nats for name, nats in every.items() if nats is not None}

    @property
    def measured_on(self) -> str:
        """Description of the samples that were measured."""
        return counted(self.samples, "sample") + (", each after the others" if self.leave_one_out else " held out")

    @property
    def figures(self) -> str:
        """The losses as text."""
        return ", ".join(f"{name} {nats:.3f}" for name, nats in self.losses.items())

    @property
    def helps(self) -> bool:
        """Whether the context helps by itself; if not, a gain on top of an adapter is chance, on a few samples."""
        return self.neither - self.context > self.least

    @property
    def recommended(self) -> Served:
        """Recommended choice: the best, or a cheaper one per request that is hardly worse.

        A context that does not help by itself is excluded. One that does is served with an adapter that was not
        measured.
        """
        if self.adapter is None:
            return "both" if self.helps else "adapter"
        losses = {name: self.losses[name] for name in (_BY_COST if self.helps else _WITHOUT_CONTEXT)}
        best = min(losses.values())
        # A base model that does not know the form of answers has a large loss, so all differences look small.
        allowed = best + _HARDLY * min(self.neither - best, best)
        return next(name for name, nats in losses.items() if nats <= allowed)

    @property
    def recommends_context(self) -> bool:
        """Whether to serve the context, alone or with the adapter."""
        return self.recommended not in _WITHOUT_CONTEXT


@dataclass(frozen=True)
class ContextAblation:
    """Loss of samples without and with a context, in nats per token, with the base model's current adapter."""

    without: float
    with_context: float
    samples: int
    error: float = 0.0  # standard error of the mean difference, for leave-one-out

    @classmethod
    def of(
        cls, scorer: ContextScorer, chosen: ChosenContext, samples: Sequence[Any], *, leave_one_out: bool = False
    ) -> ContextAblation | None:
        """Measure samples after a context that lacks them, or with `leave_one_out` each one after all others.

        Returns None if no sample can be measured.
        """
        if not leave_one_out:
            if not samples:
                return None
            return cls(scorer.score(None, samples).value, scorer.score(chosen.context, samples).value, len(samples))
        pairs: list[tuple[Score, Score]] = []
        for place, sample in enumerate(samples):
            others = scorer.fitting([*samples[:place], *samples[place + 1 :]], chosen.length, chosen.tokens)
            if others:
                context = scorer.context_of(others, chosen.length).context
                with suppress(DataError):  # a sample of a single token has no loss; the others still count
                    pairs.append((scorer.score(None, [sample]), scorer.score(context, [sample])))
        if not pairs:
            return None
        without, with_context = (
            sum(score.value * score.count for score in side) / sum(score.count for score in side)
            for side in zip(*pairs, strict=True)
        )
        _, error = estimate(torch.tensor([alone.value - read.value for alone, read in pairs], dtype=torch.float64))
        return cls(without, with_context, len(pairs), error)


def left_out(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Split samples into a held-out set, spread evenly, and the rest."""
    if len(samples) < 2 * LEFT_OUT:
        return [], list(samples)
    places = set(spread(range(len(samples)), LEFT_OUT))
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for place, sample in enumerate(samples):
        parts[place not in places].append(sample)
    return parts
