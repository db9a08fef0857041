"""Adapt a few-shot start to a task: gather evidence, step, gather evidence there, step again.

    start ──evidence──▶ step 0 ──evidence──▶ step 1 ──▶ ... ──▶ adapter, still to be cut to the rank that is written

Up to 16 samples are read again for each learned step. With more samples every step reads 16 others, and there are as
many steps as that takes: one step from 64 samples is hardly better than one from 16, but four steps are.

An adapter that will be served with the samples in its prompt is made for that: each sample is read after others, in
another order for each step (MetaICL, arXiv 2110.15943). The adapter then does not learn what the prompt already shows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from icmlora.adapter.arithmetic import plus
from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import BaseModel, Prepared
from icmlora.base_models.running.lora_hooks import factors_of
from icmlora.fewshot.evidence import gather_evidence
from icmlora.fewshot.start import USUAL_SAMPLES, FewShotStart
from icmlora.fewshot.step import lengthened, unit_steps

JOINED = 1280
"""Tokens read together, about as many as a context has."""


@dataclass(frozen=True, eq=False)
class Adapted:
    """An adapter after some steps."""

    adapter: Adapter  # its rank is the sum of the ranks of the start and of all steps so far
    nats: float  # loss on the samples before the last step, in nats per token


def adapt(
    base: BaseModel,
    start: FewShotStart,
    samples: Sequence[Prepared],
    *,
    in_context: bool = False,
    batch_size: int = 1,
) -> Iterator[Adapted]:
    """Adapt the start to a task, alone or for its context; yields the adapter after each step."""
    current = start.adapter
    names = [module.name for module in current.modules]
    for step, support in enumerate(supports(samples, len(start.rates))):
        read = shuffled_together(base, support, step) if in_context else support
        evidence = gather_evidence(base, factors_of(current), names, read, batch_size=1 if in_context else batch_size)
        lengths = [start.length(step, number, len(support), in_context=in_context) for number in range(len(names))]
        current = plus(current, lengthened(unit_steps(evidence), lengths))
        yield Adapted(current, evidence.nats)


def shuffled_together(base: BaseModel, samples: Sequence[Prepared], seed: int) -> list[Prepared]:
    """Return the samples joined into a few texts, in random order."""
    shuffled = random.Random(seed).sample(list(samples), len(samples))  # noqa: S311 - an order, not secrets
    return base.modality.joined(base, shuffled, JOINED)


def supports(samples: Sequence[Prepared], learned: int) -> list[Sequence[Prepared]]:
    """Return the samples that each step reads: all if at most 16, else 16 from across the file."""
    # The file may be sorted, for example by topic. Each sample is read at least once.
    if len(samples) <= USUAL_SAMPLES:
        return [samples] * learned
    steps = max(learned, math.ceil(len(samples) / USUAL_SAMPLES))
    # Every step-th sample in turn, so that neighbours in the file end up in different steps.
    mixed = [sample for first in range(steps) for sample in samples[first::steps]]
    places = [range(step * USUAL_SAMPLES, (step + 1) * USUAL_SAMPLES) for step in range(steps)]
    return [[mixed[place % len(mixed)] for place in some] for some in places]
