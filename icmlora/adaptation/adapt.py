"""Adapt a start to a task: gather evidence, step, gather evidence there, step again.

start ──evidence──▶ step 0 ──evidence──▶ step 1 ──▶ ... ──▶ adapter, to be cut to the rank that is written

Up to 16 samples are read anew for each of the learned steps. Of more samples every step reads 16 others, and there are
as many steps as that takes: a step from 64 samples is hardly better than one from 16, and four of them are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from icmlora.adaptation.evidence import gather_evidence
from icmlora.adaptation.start import USUAL_SAMPLES, Start
from icmlora.adaptation.step import lengthened, unit_steps
from icmlora.adapter import Adapter
from icmlora.arithmetic import plus
from icmlora.base_model import BaseModel
from icmlora.evaluation import Scored
from icmlora.generator.relaxed import Factors


@dataclass(frozen=True, eq=False)
class Adapted:
    """An adapter after some steps."""

    adapter: Adapter
    """Of full rank: the start's and that of all steps so far."""
    nats: float
    """Loss on the samples before the last of these steps, in nats per token."""


def adapt(base: BaseModel, start: Start, samples: Sequence[Scored], *, batch_size: int = 1) -> Iterator[Adapted]:
    """Adapt the start to a task, step by step.

    Args:
        base: The base model; it is left as it was.
        start: Where to begin.
        samples: The task's samples as token ids.
        batch_size: Samples a pass.

    Yields:
        The adapter after each step; the last is the answer.
    """
    current = start.adapter
    names = [module.name for module in current.modules]
    for step, support in enumerate(supports(samples, len(start.rates))):
        evidence = gather_evidence(base, factors_of(current), names, support, batch_size=batch_size)
        lengths = [start.length(step, number, len(support)) for number in range(len(names))]
        current = plus(current, lengthened(unit_steps(evidence), lengths))
        yield Adapted(current, evidence.nats)


def supports(samples: Sequence[Scored], learned: int) -> list[Sequence[Scored]]:
    """Return which samples each step reads.

    Args:
        samples: All of them, which may be in an order that means something.
        learned: Steps that there are at least.

    Returns:
        For each step all samples if they are 16 or fewer, else 16 of them, from all over; each is read at least once.
    """
    if len(samples) <= USUAL_SAMPLES:
        return [samples] * learned
    steps = max(learned, math.ceil(len(samples) / USUAL_SAMPLES))
    mixed = [sample for first in range(steps) for sample in samples[first::steps]]
    places = [range(step * USUAL_SAMPLES, (step + 1) * USUAL_SAMPLES) for step in range(steps)]
    return [[mixed[place % len(mixed)] for place in some] for some in places]


def factors_of(adapter: Adapter) -> Factors:
    """Return an adapter's factors by module name."""
    return {module.name: (module.a, module.b) for module in adapter.modules}
