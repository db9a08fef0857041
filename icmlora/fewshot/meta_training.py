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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from icmlora.adapter.arithmetic import plus, times
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.modality import BaseModel, Prepared
from icmlora.base_models.running.lora_hooks import Factors, factors_of
from icmlora.errors import GeneratorError
from icmlora.fewshot.adapt import JOINED, shuffled_together
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


def meta_train(
    base: BaseModel, start: FewShotStart, fleet: EpisodeSource, config: MetaConfig
) -> Iterator[tuple[Episode, FewShotStart]]:
    """Learn a start's step lengths; yields it after each episode. Raise `GeneratorError` if one diverges."""
    # In eighths: rates (steps, modules), slopes and in-context offsets (steps,).
    rows = (start.rates, start.slopes, start.in_context)
    learned = [torch.tensor(row, dtype=torch.float32, requires_grad=True) for row in rows]
    optimizer = torch.optim.Adam(learned, lr=config.learning_rate, betas=(0.9, 0.95))
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
        samples = list(fleet.samples(task))
        shuffled = draw.sample(samples, len(samples))
        # At most half of the samples are support, to leave some as queries.
        size = min(size, max(1, len(shuffled) // 2))
        support, rest = shuffled[:size], shuffled[size:] or shuffled
        if in_context:  # no sample follows itself
            count = min(config.query_in_context, len(rest))
            drawn = [draw.sample(rest, count) for _ in range(config.updates)]
            queries = [base.modality.joined(base, query, JOINED) for query in drawn]
        else:
            queries = [[draw.choice(rest) for _ in range(config.query)] for _ in range(config.updates)]
        own = fleet.load(task)
        others, lengths = _without(start, own), partial(_lengths, start, learned, size, in_context=in_context)
        # Directions are gathered once per episode, with the current rates; only their lengths get gradients.
        current, units = others, list[tuple[LoraModule, ...]]()
        for step in range(len(start.rates)):
            read = shuffled_together(base, support, step) if in_context else support
            names = [module.name for module in others.modules]
            units.append(unit_steps(gather_evidence(base, factors_of(current), names, read)))
            current = plus(current, lengthened(units[-1], lengths(step).tolist()))
        losses = []  # on each query, relative to the task's own adapter
        for query in queries:
            with torch.no_grad():
                # Nats per token of the bare base model and of the task's own adapter: 1 and 0 on the loss's scale.
                nothing, best = (_nats(base, factors, query) for factors in ({}, factors_of(own)))
            optimizer.zero_grad()
            with mean_loss(base, _stepped(others, units, lengths), query) as nats:
                loss = (nats - best) / max(nothing - best, _MIN_GAIN)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        if not (math.isfinite(mean) and all(bool(torch.isfinite(row).all()) for row in learned)):
            hint = "run again with another --seed; the stored few-shot start is unchanged"
            raise GeneratorError(f"episode {number + 1}, of {size} samples, diverged", hint=hint)
        rates, slopes, offsets = (row.detach().round().clamp(-_LIMIT, _LIMIT).int().tolist() for row in learned)
        after = replace(start, rates=tuple(map(tuple, rates)), slopes=tuple(slopes), in_context=tuple(offsets))
        yield Episode(number + 1, config.episodes, task, size, in_context, mean), after


def _lengths(
    start: FewShotStart, learned: Sequence[torch.Tensor], samples: int, step: int, *, in_context: bool
) -> torch.Tensor:
    """Return the lengths of a step, shape (modules,), with gradients to the learned numbers."""
    rates, slopes, offsets = (row[step] for row in learned)
    sizes = torch.tensor(start.sizes, dtype=torch.float32)
    return torch.exp2(octaves(sizes, rates + offsets if in_context else rates, slopes, samples))


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


def _stepped(
    adapter: Adapter, units: Sequence[Sequence[LoraModule]], lengths: Callable[[int], torch.Tensor]
) -> Factors:
    """Concatenate the factors of an adapter and of some steps, with gradients to the steps' lengths (modules,)."""
    parts = {module.name: ([module.a], [module.b]) for module in adapter.modules}
    for step, directions in enumerate(units):
        for unit, length in zip(directions, lengths(step), strict=True):
            a, b = parts[unit.name]
            a.append(unit.a)
            b.append(length * unit.b)
    return {name: (torch.cat(a), torch.cat(b, dim=1)) for name, (a, b) in parts.items()}
