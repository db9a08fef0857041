"""Learn how far to step, from tasks whose adapters are known.

One episode: one task of the fleet is treated as unseen, and the start is the mean of the others.

    support (K samples) ──evidence──▶ directions of each step, |dW| = 1
    query (other samples) ──base + start + sum of length * direction──▶ loss ──gradient──▶ rates, slopes

    minimise   (loss - loss of the task's own adapter) / (loss of the base model - loss of the task's own adapter)

Every task thus counts the same: 0 is as good as its own adapter, 1 as good as no adapter. Directions are treated as
constants (first-order MAML, arXiv 1803.02999). The base model is frozen; only a few numbers per module are learned.

Where samples can precede others, every other episode makes the adapter for its context: support and query samples are
then joined into longer texts, also for the losses of the base model and of the task's own adapter.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from icmlora.adapter.arithmetic import plus, times
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.modality import BaseModel, Prepared
from icmlora.base_models.running.lora_hooks import Factors, factors_of
from icmlora.errors import GeneratorError
from icmlora.fewshot.adapt import JOINED, behind_each_other
from icmlora.fewshot.evidence import gather_evidence, mean_loss
from icmlora.fewshot.start import FewShotStart, octaves
from icmlora.fewshot.step import lengthened, unit_steps
from icmlora.generator.scales import OCTAVE

_MIN_GAIN = 0.2  # in nats per token: where a task's own adapter gains less, the loss is divided by this, not by noise
_LIMIT = 8 * OCTAVE  # rates stay within eight octaves of a module's usual size


@dataclass(frozen=True)
class MetaConfig:
    """Options of meta-training."""

    episodes: int = 48
    updates: int = 4  # optimiser steps per episode, each on other query samples
    query: int = 2  # query samples per update
    query_in_context: int = 4  # query samples per update of an adapter made for its context, in one text
    support: tuple[int, ...] = (1, 4, 16)  # numbers of support samples, drawn evenly
    learning_rate: float = 0.5  # Adam's, in eighths of an octave
    seed: int = 0


@dataclass(frozen=True)
class Episode:
    """Result of one episode."""

    number: int  # counted from 1
    episodes: int
    task: int
    support: int
    in_context: bool  # whether the adapter was made for its context
    # Mean over the updates, on query samples: 0 is as good as the task's own adapter, 1 as good as no adapter.
    loss: float


class EpisodeSource(Protocol):
    """A fleet with samples, read one task at a time."""

    def tasks(self) -> int:
        """Return the number of tasks."""

    def load(self, task: int) -> Adapter:
        """Read the adapter of a task."""

    def samples(self, task: int) -> Sequence[Prepared]:
        """Return two or more samples of a task, from the modality's `prepare`."""


@dataclass(frozen=True, eq=False)
class _Rates:
    """Learned numbers, in eighths: rates (steps, modules), slopes and in-context offsets (steps,)."""

    rates: torch.Tensor
    slopes: torch.Tensor
    in_context: torch.Tensor

    @classmethod
    def of(cls, start: FewShotStart) -> _Rates:
        """Copy the numbers from a start."""
        rows = (start.rates, start.slopes, start.in_context)
        return cls(*(torch.tensor(row, dtype=torch.float32, requires_grad=True) for row in rows))

    @property
    def every(self) -> list[torch.Tensor]:
        """All learned tensors."""
        return [self.rates, self.slopes, self.in_context]

    def lengths(self, start: FewShotStart, step: int, samples: int, *, in_context: bool) -> torch.Tensor:
        """Return the lengths of a step, shape (modules,)."""
        sizes = torch.tensor(start.sizes, dtype=torch.float32)
        rates = self.rates[step] + self.in_context[step] if in_context else self.rates[step]
        return torch.exp2(octaves(sizes, rates, self.slopes[step], samples))

    def is_finite(self) -> bool:
        """Return whether all numbers are finite, so they can be rounded to integers."""
        return all(bool(torch.isfinite(one).all()) for one in self.every)

    def into(self, start: FewShotStart) -> FewShotStart:
        """Return the start with these numbers, rounded as stored."""
        whole = [one.detach().round().clamp(-_LIMIT, _LIMIT).int().tolist() for one in self.every]
        return replace(start, rates=tuple(map(tuple, whole[0])), slopes=tuple(whole[1]), in_context=tuple(whole[2]))


def meta_train(
    base: BaseModel, start: FewShotStart, fleet: EpisodeSource, config: MetaConfig
) -> Iterator[tuple[Episode, FewShotStart]]:
    """Learn a start's step lengths; yields it after each episode. Raise `GeneratorError` if one diverges."""
    learned = _Rates.of(start)
    optimizer = torch.optim.Adam(learned.every, lr=config.learning_rate, betas=(0.9, 0.95))
    draw = random.Random(config.seed)  # noqa: S311 - training noise, not secrets
    order: list[int] = []
    for number in range(config.episodes):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - number / config.episodes)
        order = order or draw.sample(range(fleet.tasks()), fleet.tasks())  # every task once before any repeats
        task = order.pop()
        size = draw.choice(config.support)
        turn, place = divmod(number, fleet.tasks())
        in_context = base.modality.takes_context and (turn + place) % 2 == 1  # other tasks in the next round
        support, queries = _split(fleet.samples(task), size, config, draw, in_context=in_context)
        if in_context:
            queries = [base.modality.joined(base, query, JOINED) for query in queries]
        loss = _episode(base, start, fleet.load(task), support, queries, learned, optimizer, in_context=in_context)
        if not (math.isfinite(loss) and learned.is_finite()):
            hint = "run again with another --seed; the stored few-shot start is unchanged"
            raise GeneratorError(f"episode {number + 1}, of {len(support)} samples, diverged", hint=hint)
        yield Episode(number + 1, config.episodes, task, len(support), in_context, loss), learned.into(start)


def _split(
    samples: Sequence[Prepared], size: int, config: MetaConfig, draw: random.Random, *, in_context: bool
) -> tuple[list[Prepared], list[list[Prepared]]]:
    """Draw support samples, and each update's query samples from the rest."""
    shuffled = draw.sample(list(samples), len(samples))
    # At most half of the samples are support, to leave some as queries.
    size = min(size, max(1, len(shuffled) // 2))
    support, rest = shuffled[:size], shuffled[size:] or shuffled
    if in_context:  # no sample follows itself
        count = min(config.query_in_context, len(rest))
        return support, [draw.sample(rest, count) for _ in range(config.updates)]
    return support, [[draw.choice(rest) for _ in range(config.query)] for _ in range(config.updates)]


def _episode(
    base: BaseModel,
    start: FewShotStart,
    own: Adapter,
    support: Sequence[Prepared],
    queries: Sequence[Sequence[Prepared]],
    learned: _Rates,
    optimizer: torch.optim.Optimizer,
    *,
    in_context: bool,
) -> float:
    """Step through one task and update the rates on each query; return the mean loss."""
    others = _without(start, own)
    # Directions are gathered once per episode, with the current rates; only their lengths get gradients.
    current, units = others, list[tuple[LoraModule, ...]]()
    names = [module.name for module in others.modules]
    for step in range(len(start.rates)):
        read = behind_each_other(base, support, step) if in_context else support
        units.append(unit_steps(gather_evidence(base, factors_of(current), names, read)))
        lengths = learned.lengths(start, step, len(support), in_context=in_context).tolist()
        current = plus(current, lengthened(units[-1], lengths))
    losses = []  # on each query, relative to the task's own adapter
    for query in queries:
        with torch.no_grad():
            # Nats per token of the bare base model and of the task's own adapter: 1 and 0 on the scale of the loss.
            nothing, best = (_nats(base, factors, query) for factors in ({}, factors_of(own)))
        every = [learned.lengths(start, step, len(support), in_context=in_context) for step in range(len(units))]
        optimizer.zero_grad()
        with mean_loss(base, _stepped(others, units, every), query) as nats:
            loss = (nats - best) / max(nothing - best, _MIN_GAIN)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def _nats(base: BaseModel, factors: Factors, batch: Sequence[Prepared]) -> float:
    with mean_loss(base, factors, batch) as nats:
        return nats.item()


def _without(start: FewShotStart, own: Adapter) -> Adapter:
    """Return the mean of the other tasks, as exactly as the start's rank allows."""
    if start.tasks < 2:
        return start.adapter
    mean = times(start.adapter.modules, start.tasks / (start.tasks - 1))
    known = {module.name for module in start.adapter.modules}
    rest = [module for module in own.modules if module.name in known]
    return plus(replace(start.adapter, modules=tuple(mean)), times(rest, -1 / (start.tasks - 1)))


def _stepped(adapter: Adapter, units: Sequence[Sequence[LoraModule]], lengths: Sequence[torch.Tensor]) -> Factors:
    """Concatenate the factors of an adapter and of some steps, with gradients to the steps' lengths (modules,)."""
    parts = {module.name: ([module.a], [module.b]) for module in adapter.modules}
    for step, length in zip(units, lengths, strict=True):
        for number, unit in enumerate(step):
            a, b = parts[unit.name]
            a.append(unit.a)
            b.append(length[number] * unit.b)
    return {name: (torch.cat(a), torch.cat(b, dim=1)) for name, (a, b) in parts.items()}
