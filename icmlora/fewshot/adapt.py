"""Adapt a start to a task: gather evidence, step, gather evidence there, step again.

start ──evidence──▶ step 0 ──evidence──▶ step 1 ──▶ ... ──▶ adapter, to be cut to the rank that is written

Up to 16 samples are read anew for each of the learned steps. Of more samples every step reads 16 others, and there are
as many steps as that takes: a step from 64 samples is hardly better than one from 16, and four of them are.

Go on from an adapter with ordinary gradient steps on a few samples.

minimise   loss of some of the samples, drawn anew for each step        by Adam, over the factors A and B
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from icmlora.adapter.canonical import plus
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.modality import BaseModel, Prepared
from icmlora.fewshot.evidence import gather_evidence, mean_loss
from icmlora.fewshot.start import USUAL_SAMPLES, FewShotStart
from icmlora.fewshot.step import lengthened, unit_steps
from icmlora.generator.relaxed import Factors


@dataclass(frozen=True, eq=False)
class Adapted:
    """An adapter after some steps."""

    adapter: Adapter
    """Of full rank: the start's and that of all steps so far."""
    nats: float
    """Loss on the samples before the last of these steps, in nats per token."""


def adapt(
    base: BaseModel, start: FewShotStart, samples: Sequence[Prepared], *, batch_size: int = 1
) -> Iterator[Adapted]:
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


def supports(samples: Sequence[Prepared], learned: int) -> list[Sequence[Prepared]]:
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


_GRADIENT_LIMIT = 1.0


@dataclass(frozen=True)
class FinetuneConfig:
    """How an adapter is fine-tuned."""

    steps: int
    learning_rate: float = 1e-3
    """Peak of a linear schedule down to zero, after a tenth of the steps to warm up."""
    batch: int = 2
    """Samples of each step."""
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rising = max(1, self.steps // 10)
        return self.learning_rate * min((step + 1) / rising, (self.steps - step) / max(1, self.steps - rising))


def finetune(
    base: BaseModel, adapter: Adapter, samples: Sequence[Prepared], config: FinetuneConfig
) -> Iterator[tuple[float, Adapter]]:
    """Fine-tune the factors of an adapter.

    Args:
        base: The base model; it is left as it was.
        adapter: Where to begin; it is not changed.
        samples: Token ids; every one is drawn once before any is drawn again.
        config: The options.

    Yields:
        After each step its loss in nats per token, and the adapter as it is then.
    """
    device = base.device
    pairs = {m.name: (_leaf(m.a, device), _leaf(m.b, device)) for m in adapter.modules}
    weights = [factor for pair in pairs.values() for factor in pair]
    optimizer = torch.optim.Adam(weights, lr=config.learning_rate)
    draw = random.Random(config.seed)  # noqa: S311 - the order of samples, not secrets
    waiting: list[Prepared] = []
    for step in range(config.steps):
        while len(waiting) < config.batch:
            waiting += draw.sample(list(samples), len(samples))
        batch, waiting = waiting[: config.batch], waiting[config.batch :]
        for group in optimizer.param_groups:
            group["lr"] = config.rate_at(step)
        optimizer.zero_grad()
        with mean_loss(base, pairs, batch) as loss:
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, _GRADIENT_LIMIT)
        optimizer.step()
        modules = [LoraModule(name, _copy(a), _copy(b)) for name, (a, b) in pairs.items()]
        yield loss.item(), replace(adapter, modules=tuple(modules))


def _leaf(factor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return factor.detach().to(device).clone().requires_grad_()


def _copy(factor: torch.Tensor) -> torch.Tensor:
    return factor.detach().clone().cpu()  # the next step changes the leaf in place
