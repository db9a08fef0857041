"""What a fleet knows about tasks that it has not seen: where to start, and how far each module steps from there.

start: the fleet's mean dW, of a small rank         size: usual |dW| of a module over the fleet
step s of a module, on K samples, has the length    size * 2^((rate[s] + slope[s] * log2(K / 16)) / 8)
step s after the last one that was learned          that of the last, less half an octave for each step in between
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from icmlora.adapter import Adapter
from icmlora.arithmetic import mean_adapter, truncated, with_modules
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.scales import OCTAVE
from icmlora.metrics import module_norms

RANK = 16
"""Directions that the start has of each module."""
USUAL_SAMPLES = 16
"""How many samples rates are for; slopes say what more or fewer are worth."""
FIRST_RATES = (-22, -26)
"""Of steps that nothing was learned about, in eighths: a seventh and a tenth of a module's usual size."""
FIRST_SLOPE = 1
_SHORTER = 4
"""Eighths of an octave by which each step after the last learned one is shorter: 0.7 and 0.5 of it were tried."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where an adapter for an unseen task begins, and the lengths of its steps."""

    adapter: Adapter
    """The fleet's mean."""
    sizes: tuple[int, ...]
    """log2 of the usual |dW| of each module of it, in eighths."""
    rates: tuple[tuple[int, ...], ...]
    """By step and module: log2 of a step's length in sizes, in eighths."""
    slopes: tuple[int, ...]
    """By step: what twice as many samples add to the rates, in eighths."""
    tasks: int
    """How many tasks it was made of."""

    def length(self, step: int, module: int, samples: int) -> float:
        """Return how long a step of a module is."""
        learned = min(step, len(self.rates) - 1)
        rate = self.rates[learned][module] - _SHORTER * (step - learned)
        return float(2.0 ** octaves(self.sizes[module], rate, self.slopes[learned], samples))


Number = TypeVar("Number", float, torch.Tensor)


def octaves(size: Number, rate: Number, slope: Number, samples: int) -> Number:
    """Return log2 of the length of a step, of numbers or of tensors of them; what is given is in eighths."""
    return (size + (rate + slope * math.log2(samples / USUAL_SAMPLES))) / OCTAVE


def within(start: Start, config: GeneratorConfig) -> Start:
    """Return what a generator can encode of a start: its modules, and as many directions as it has rank slots.

    Raises:
        ValueError: It has none of the modules.
    """
    shapes = start.adapter.layout
    kept = [number for number, shape in enumerate(shapes) if config.covers([shape._replace(rank=1)])]
    if not kept:
        raise ValueError("the generator has no module of the start")
    modules = [start.adapter.modules[number] for number in kept]
    return replace(
        start,
        adapter=truncated(with_modules(start.adapter, modules), config.slots),
        sizes=tuple(start.sizes[number] for number in kept),
        rates=tuple(tuple(row[number] for number in kept) for row in start.rates),
    )


def untrained_start(adapters: Iterable[Adapter], rank: int = RANK) -> Start:
    """Make the start of a fleet, with lengths that nothing was learned about.

    Args:
        adapters: The fleet's; read once, one at a time.
        rank: Directions kept of each module.

    Raises:
        ValueError: There is no adapter.
    """
    logs: defaultdict[str, list[float]] = defaultdict(list)
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
    middle = sum(known) / len(known)
    sizes = tuple(round(OCTAVE * usual.get(module.name, middle)) for module in mean.modules)
    return unlearned(Start(mean, sizes, (), (), count))


def unlearned(start: Start) -> Start:
    """Return a start with the lengths that it has before the first episode."""
    rates = tuple((rate,) * len(start.sizes) for rate in FIRST_RATES)
    return replace(start, rates=rates, slopes=(FIRST_SLOPE,) * len(rates))
