"""What a fleet knows about tasks that it has not seen: where to start, and how far each module steps from there.

start: the fleet's mean dW, of a small rank         size: usual |dW| of a module over the fleet
step s of a module, on K samples, has the length    size * 2^((rate[s] + slope[s] * log2(K / 16)) / 8)
step s after the last one that was learned          that of the last, less half an octave for each step in between

The start file: what a generator knows of tasks that it has not seen, beside its own file.

    ICMS 1 | length of head (4) | head: JSON, zlib | code of the mean (icmlora/generator/code.py) | check (8)

The mean is stored as any adapter is, as a code of the generator; the head holds sizes, rates and slopes as whole
eighths of an octave, in the natural order of the mean's modules. The check is the beginning of the SHA-256 of the rest.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from icmlora.adapter.canonical import mean_adapter, truncated, with_modules
from icmlora.adapter.metrics import module_norms
from icmlora.adapter.model import Adapter
from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.codec import Codec
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.container import inflate
from icmlora.generator.scales import OCTAVE
from icmlora.io.checksum import add_checksum, checked

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
class FewShotStart:
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


def encodable_part(start: FewShotStart, config: GeneratorConfig) -> FewShotStart:
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


def untrained_fewshot_start(adapters: Iterable[Adapter], rank: int = RANK) -> FewShotStart:
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
    return with_first_lengths(FewShotStart(mean, sizes, (), (), count))


def with_first_lengths(start: FewShotStart) -> FewShotStart:
    """Return a start with the lengths that it has before the first episode."""
    rates = tuple((rate,) * len(start.sizes) for rate in FIRST_RATES)
    return replace(start, rates=rates, slopes=(FIRST_SLOPE,) * len(rates))


MAGIC = b"ICMS\x01"
_BEFORE_HEAD = len(MAGIC) + 4
_HEAD_LIMIT = 1 << 22
_STEPS_LIMIT = 64
_EXPONENT_LIMIT = 1024
_TASKS_LIMIT = 1 << 32
_TOLERANCE = 0.25
"""Weighted error of the mean's code: half of its size buys less than 0.01 of retained gain (docs/results/LOG.md)."""


def mean_code(start: FewShotStart, codec: Codec) -> bytes:
    """Encode a start's mean under a generator; the lengths of steps are then learned for what it decodes to.

    Raises:
        GeneratorError: The generator does not cover the mean.
    """
    return codec.encode(start.adapter, {}, tolerance=_TOLERANCE).data


def fewshot_start_to_bytes(start: FewShotStart, code: bytes) -> bytes:
    """Write a start whose mean is what a code decodes to; the same start gives the same bytes."""
    head = {"sizes": start.sizes, "rates": start.rates, "slopes": start.slopes, "tasks": start.tasks}
    packed = zlib.compress(json.dumps(head, sort_keys=True).encode(), 9)
    return add_checksum(MAGIC + struct.pack("<I", len(packed)) + packed + code)


def fewshot_start_from_bytes(data: bytes, decode: Callable[[bytes], Adapter]) -> FewShotStart:
    """Read a start file.

    Args:
        data: The file.
        decode: Turns the mean's code into an adapter, as the generator's codec does.

    Raises:
        GeneratorError: Not a start file, of a newer format, damaged, or of another generator.
    """
    content = checked(data) if data.startswith(MAGIC) else None
    if content is None or len(content) < _BEFORE_HEAD:
        raise GeneratorError("not a start file, of another format, or damaged", hint="`icm train --objective both`")
    (length,) = struct.unpack_from("<I", content, len(MAGIC))
    end = _BEFORE_HEAD + length
    try:
        head = json.loads(inflate(content[_BEFORE_HEAD:end], 2, _HEAD_LIMIT))
        adapter = decode(content[end:])
        start = FewShotStart(
            adapter=adapter,
            sizes=_whole(head["sizes"]),
            rates=tuple(_whole(row) for row in head["rates"]),
            slopes=_whole(head["slopes"]),
            tasks=_whole([head["tasks"]], _TASKS_LIMIT)[0],
        )
    except (CodeError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise GeneratorError(f"the start file is damaged or of another generator ({error})") from error
    lengths = {len(start.sizes), *map(len, start.rates)}
    if (
        start.tasks < 1
        or lengths != {len(adapter.modules)}
        or not 1 <= len(start.rates) == len(start.slopes) <= _STEPS_LIMIT
    ):
        raise GeneratorError("the start file's head is not that of its mean")
    return start


def _whole(values: object, limit: int = _EXPONENT_LIMIT) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and abs(value) <= limit for value in values):
        raise ValueError("a row of the head is out of range")
    return tuple(values)
