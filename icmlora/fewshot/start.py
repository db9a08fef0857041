"""A fleet's prior for unseen tasks: where to start, and how far each module steps from there.

start                                    the fleet's mean dW, of a small rank
size                                     usual |dW| of a module over the fleet
length of a module's step s, K samples   size * 2^((rate[s] + slope[s] * log2(K / 16)) / 8)
  for an adapter made for its context    2^(in_context[s] / 8) times that
  after the last learned step            half an octave shorter than the step before it
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from icmlora.adapter.arithmetic import mean_adapter, truncated, with_modules
from icmlora.adapter.metrics import module_norms
from icmlora.adapter.model import Adapter
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.scales import OCTAVE

RANK = 16  # directions of the start in each module
USUAL_SAMPLES = 16  # number of samples that rates are for; slopes adjust them for more or fewer
# Rates before any episode, in eighths of an octave: a seventh and a tenth of a module's usual size.
FIRST_RATES = (-22, -26)
FIRST_SLOPE = 1
# Eighths of an octave that each step after the last learned one loses; factors of 0.7 and 0.5 were tried.
_SHORTER = 4

Number = TypeVar("Number", float, torch.Tensor)


@dataclass(frozen=True, eq=False)
class FewShotStart:
    """Where an adapter for an unseen task begins, and the lengths of its steps."""

    adapter: Adapter  # the fleet's mean
    sizes: tuple[int, ...]  # log2 of the usual |dW| of each of its modules, in eighths
    # By step and module: log2 of a step's length relative to the module's size, in eighths.
    rates: tuple[tuple[int, ...], ...]
    slopes: tuple[int, ...]  # by step: added to the rates for twice as many samples, in eighths
    in_context: tuple[int, ...]  # by step: added to the rates for an adapter made for its context, in eighths
    tasks: int  # number of tasks it was made from

    def length(self, step: int, module: int, samples: int, *, in_context: bool = False) -> float:
        """Return |dW| of a module's step, counted from 0, for a number of samples."""
        learned = min(step, len(self.rates) - 1)
        rate = self.rates[learned][module] - _SHORTER * (step - learned)
        if in_context:
            rate += self.in_context[learned]
        return float(2.0 ** octaves(self.sizes[module], rate, self.slopes[learned], samples))


def octaves(size: Number, rate: Number, slope: Number, samples: int) -> Number:
    """Return log2 of a step's length, for numbers or tensors in eighths."""
    return (size + (rate + slope * math.log2(samples / USUAL_SAMPLES))) / OCTAVE


def untrained_fewshot_start(adapters: Iterable[Adapter], rank: int = RANK) -> FewShotStart:
    """Make the start of a fleet, with step lengths that were not learned."""
    logs: defaultdict[str, list[float]] = defaultdict(list)  # log2 |dW| over the fleet, by module name
    count = 0

    def measured() -> Iterable[Adapter]:
        nonlocal count
        for adapter in adapters:
            count += 1
            for name, norm in module_norms(adapter).items():
                if norm > 0:
                    logs[name].append(math.log2(norm))
            yield adapter

    mean = mean_adapter(measured(), rank)
    known = [log for group in logs.values() for log in group] or [0.0]
    usual = {name: sum(group) / len(group) for name, group in logs.items()}
    middle = sum(known) / len(known)  # for a module that is zero in every adapter
    sizes = tuple(round(OCTAVE * usual.get(module.name, middle)) for module in mean.modules)
    return with_first_lengths(FewShotStart(mean, sizes, (), (), (), count))


def with_first_lengths(start: FewShotStart) -> FewShotStart:
    """Return a start with its step lengths reset to those before the first episode."""
    rates = tuple((rate,) * len(start.sizes) for rate in FIRST_RATES)
    return replace(start, rates=rates, slopes=(FIRST_SLOPE,) * len(rates), in_context=(0,) * len(rates))


def encodable_part(start: FewShotStart, config: GeneratorConfig) -> FewShotStart:
    """Return the modules and directions of a start that a generator can encode; `ValueError` if there are none."""
    shapes = start.adapter.layout
    kept = [number for number, shape in enumerate(shapes) if config.covers([shape._replace(rank=1)])]
    if not kept:
        raise ValueError("the few-shot start has no module of the generator")
    modules = [start.adapter.modules[number] for number in kept]
    return replace(
        start,
        adapter=truncated(with_modules(start.adapter, modules), config.slots),
        sizes=tuple(start.sizes[number] for number in kept),
        rates=tuple(tuple(row[number] for number in kept) for row in start.rates),
    )
