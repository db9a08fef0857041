"""Fine-tune an adapter with ordinary gradient steps.

minimise   loss of some of the samples, drawn again for each step        by Adam, over the factors A and B
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.modality import BaseModel, Prepared
from icmlora.base_models.running.lora_hooks import Factors
from icmlora.fewshot.evidence import mean_loss

_GRADIENT_LIMIT = 1.0


@dataclass(frozen=True)
class FinetuneConfig:
    """Options of fine-tuning."""

    steps: int
    learning_rate: float = 1e-3  # peak of a linear schedule: up during the first tenth of the steps, then down to zero
    batch: int = 2  # samples per step
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rising = max(1, self.steps // 10)
        return self.learning_rate * min((step + 1) / rising, (self.steps - step) / max(1, self.steps - rising))


def finetune(
    base: BaseModel, adapter: Adapter, samples: Sequence[Prepared], config: FinetuneConfig
) -> Iterator[tuple[float, Adapter]]:
    """Fine-tune an adapter's factors on samples; yields each step's loss (nats per token) and adapter."""

    def loss(factors: Factors, batch: Sequence[int]) -> AbstractContextManager[torch.Tensor]:
        return mean_loss(base, factors, [samples[number] for number in batch])

    return descend(base.device, adapter, loss, len(samples), config)


def descend(
    device: torch.device,
    adapter: Adapter,
    loss_of: Callable[[Factors, Sequence[int]], AbstractContextManager[torch.Tensor]],
    samples: int,
    config: FinetuneConfig,
) -> Iterator[tuple[float, Adapter]]:
    """Minimise a loss over random samples; yields each step's loss and adapter."""
    # Every sample is drawn once before any is drawn again.
    # The copies of leaves are needed because the next step changes these in place.
    weights = [one.detach().to(device).clone().requires_grad_() for m in adapter.modules for one in (m.a, m.b)]
    names = [module.name for module in adapter.modules]
    pairs = dict(zip(names, zip(weights[::2], weights[1::2], strict=True), strict=True))
    optimizer = torch.optim.Adam(weights, lr=config.learning_rate)
    draw = random.Random(config.seed)  # noqa: S311 - the order of samples, not secrets
    waiting: list[int] = []
    for step in range(config.steps):
        while len(waiting) < config.batch:  # the next pass over the samples, in another order
            waiting += draw.sample(range(samples), samples)
        batch, waiting = waiting[: config.batch], waiting[config.batch :]
        for group in optimizer.param_groups:
            group["lr"] = config.rate_at(step)
        optimizer.zero_grad()
        with loss_of(pairs, batch) as loss:
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, _GRADIENT_LIMIT)
        optimizer.step()
        copies = [factor.detach().clone().cpu() for factor in weights]
        modules = map(LoraModule, names, copies[::2], copies[1::2])
        yield loss.item(), replace(adapter, modules=tuple(modules))
