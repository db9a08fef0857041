"""Adapt a start to a task: gather evidence, step, gather evidence there, step again.

start ──evidence──▶ step 0 ──evidence──▶ step 1 ──▶ adapter, to be cut to the rank that is written
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from icmlora.adaptation.evidence import gather_evidence
from icmlora.adaptation.start import Start
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
    for step in range(len(start.rates)):
        evidence = gather_evidence(base, factors_of(current), names, samples, batch_size=batch_size)
        lengths = [start.length(step, number, len(samples)) for number in range(len(names))]
        current = plus(current, lengthened(unit_steps(evidence), lengths))
        yield Adapted(current, evidence.nats)


def factors_of(adapter: Adapter) -> Factors:
    """Return an adapter's factors by module name."""
    return {module.name: (module.a, module.b) for module in adapter.modules}
