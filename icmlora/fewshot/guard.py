"""What a context and an adapter are worth for a task: losses of samples that neither of them has seen.

8 samples or more    four are left out of both, and tell
2 to 7               each is read behind the others, by the base model or with an adapter that is there anyway
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
    from icmlora.fewshot.context_choice import ChosenContext, Prompted

Served = Literal["neither", "context", "adapter", "both"]
Sample = TypeVar("Sample")

LEFT_OUT = 4
"""Samples that tell; of fewer than twice as many none are left out."""
_WITHOUT_CONTEXT: tuple[Served, ...] = ("neither", "adapter")
_BY_COST: tuple[Served, ...] = (*_WITHOUT_CONTEXT, "context", "both")
_HARDLY = 0.02  # share of what the best brings, or loses itself, that a cheaper one may lose more


@dataclass(frozen=True)
class Guard:
    """Losses in nats per token, and what they say."""

    neither: float
    context: float
    adapter: float | None  # None where no adapter was made without the samples that tell
    both: float | None
    samples: int  # that tell
    in_turn: bool = False  # whether each was read behind the others, and none was left out
    least: float = 0.0  # that the context has to bring by itself, in nats per token

    @classmethod
    def of(cls, bare: BothWays | None, adapted: BothWays | None, *, in_turn: bool) -> Guard | None:
        """Put the losses of the base model and those with an adapter together; None if there are none.

        Where the base model alone was asked, the context has to be worth more than the standard error of what it is.
        """
        if bare is None:
            return None
        if adapted is None:
            return cls(bare.without, bare.behind, None, None, bare.samples, in_turn, bare.error)
        return cls(bare.without, bare.behind, adapted.without, adapted.behind, bare.samples, in_turn)

    @property
    def losses(self) -> dict[Served, float]:
        """Those that were measured, by what is served."""
        every: dict[Served, float | None] = {
            "neither": self.neither,
            "context": self.context,
            "adapter": self.adapter,
            "both": self.both,
        }
        return {name: nats for name, nats in every.items() if nats is not None}

    @property
    def told_by(self) -> str:
        """The samples that tell, in words."""
        return counted(self.samples, "sample") + (", each after the others" if self.in_turn else " held out")

    @property
    def figures(self) -> str:
        """The losses, in words."""
        return ", ".join(f"{name} {nats:.3f}" for name, nats in self.losses.items())

    @property
    def helps(self) -> bool:
        """Whether the context is of help by itself; if not, what it adds to an adapter is chance, on a few samples."""
        return self.neither - self.context > self.least

    @property
    def recommended(self) -> Served:
        """What to serve: the best, or what is hardly worse and costs less at every request.

        A context that is no help by itself is not among them. One that is goes with an adapter that was not measured.
        """
        if self.adapter is None:
            return "both" if self.helps else "adapter"
        losses = {name: self.losses[name] for name in (_BY_COST if self.helps else _WITHOUT_CONTEXT)}
        best = min(losses.values())
        # A base model that does not know the form of answers loses much, next to which all differences are small.
        allowed = best + _HARDLY * min(self.neither - best, best)
        return next(name for name, nats in losses.items() if nats <= allowed)

    @property
    def recommends_context(self) -> bool:
        """Whether the context is to be served, alone or with the adapter."""
        return self.recommended not in _WITHOUT_CONTEXT


@dataclass(frozen=True)
class BothWays:
    """What samples lose without and behind a context, in nats per token, with whatever is on the base model."""

    without: float
    behind: float
    samples: int
    error: float = 0.0  # standard error of the mean difference, where each was read in turn

    @classmethod
    def of(cls, prompted: Prompted, chosen: ChosenContext, held: Sequence[Any]) -> BothWays | None:
        """Read samples that the context was not made from; None if there are none."""
        if not held:
            return None
        return cls(prompted.score(None, held).value, prompted.score(chosen.context, held).value, len(held))

    @classmethod
    def in_turn(cls, prompted: Prompted, chosen: ChosenContext, samples: Sequence[Any]) -> BothWays | None:
        """Read each sample of a context behind the others of it; None if none can be read so."""
        pairs: list[tuple[Score, Score]] = []
        for place, sample in enumerate(samples):
            others = prompted.fitting([*samples[:place], *samples[place + 1 :]], chosen.length, chosen.tokens)
            if others:
                context = prompted.context_of(others, chosen.length).context
                with suppress(DataError):  # one of a single token has no loss, and the others still tell
                    pairs.append((prompted.score(None, [sample]), prompted.score(context, [sample])))
        if not pairs:
            return None
        without, behind = zip(*pairs, strict=True)
        _, error = estimate(torch.tensor([alone.value - read.value for alone, read in pairs], dtype=torch.float64))
        return cls(_pooled(without), _pooled(behind), len(pairs), error)


def left_out(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Split samples into those that are left out, from all over them, and the others."""
    if len(samples) < 2 * LEFT_OUT:
        return [], list(samples)
    places = set(spread(range(len(samples)), LEFT_OUT))
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for place, sample in enumerate(samples):
        parts[place not in places].append(sample)
    return parts


def _pooled(scores: Sequence[Score]) -> float:
    return sum(score.value * score.count for score in scores) / sum(score.count for score in scores)
