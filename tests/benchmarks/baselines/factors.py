"""Baselines that store an adapter as its factors: quantised, truncated, or as a difference to the fleet's mean.

bytes        head | A, B^T of each module in natural order, all under one quantiser
Plain        the factors as trained
Truncation   dW = sum s u v^T   ->   A' = sqrt(s) v^T,  B' = u sqrt(s)  of the k strongest directions
FleetMean    shared = k strongest directions of mean(B_i A_i);   code = b"", or directions of B A - mean
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from icmlora.adapter.arithmetic import mean_adapter, plus, times, truncated
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import CodeError
from tests.benchmarks.baselines.baseline import Baseline, NamedAdapters, PerAdapter
from tests.benchmarks.baselines.head import ByteReader, Head
from tests.benchmarks.baselines.quantizers import ValueQuantizer


def factors_to_bytes(adapter: Adapter, quantizer: ValueQuantizer) -> bytes:
    """Serialise an adapter's factors as they are."""
    parts = [Head.of(adapter).to_bytes()]
    for module in adapter.modules:
        # A (r, in) and B^T (r, out): in both a row is one rank slot.
        parts += [quantizer.encode(module.a), quantizer.encode(module.b.mT)]
    return b"".join(parts)


def factors_from_bytes(data: bytes, quantizer: ValueQuantizer) -> Adapter:
    """Read an adapter back."""
    reader = ByteReader(data)
    head = Head.read(reader)
    modules = []
    for name, rank, inputs, outputs in head.layout:
        a = quantizer.decode(reader.take(quantizer.size(rank, inputs)), rank, inputs)
        b = quantizer.decode(reader.take(quantizer.size(rank, outputs)), rank, outputs)
        modules.append(LoraModule(name, a, b.mT.contiguous()))
    reader.finish()
    return head.with_modules(modules)


@dataclass(frozen=True)
class Plain(PerAdapter):
    """Quantise A and B as they were trained."""

    quantizer: ValueQuantizer

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Serialise one adapter."""
        return factors_to_bytes(adapter, self.quantizer)

    def decode(self, code: bytes, shared: bytes) -> Adapter:
        """Read it back."""
        return factors_from_bytes(code, self.quantizer)


@dataclass(frozen=True)
class Truncation(PerAdapter):
    """Keep the `rank` strongest directions of every module, or all if it has fewer."""

    rank: int
    quantizer: ValueQuantizer

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Truncate and serialise one adapter."""
        return factors_to_bytes(truncated(adapter, self.rank), self.quantizer)

    def decode(self, code: bytes, shared: bytes) -> Adapter:
        """Read it back."""
        return factors_from_bytes(code, self.quantizer)


@dataclass(frozen=True)
class FleetMean:
    """Give every task the mean of the fleet's dW, optionally with a difference of its own."""

    rank: int  # directions kept of each module
    quantizer: ValueQuantizer  # how the mean is stored
    # Stores a task's difference to the mean: a baseline that shares nothing, or None for no difference.
    residual: Baseline | None = None

    def prepare(self, fleet: NamedAdapters) -> bytes:
        """Store the mean of the modules that at least half of the tasks have; a missing module counts as zero."""
        mean = mean_adapter((fleet[task] for task in fleet), self.rank)
        return factors_to_bytes(mean, self.quantizer)

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Store the difference to the decoded mean, if differences are stored."""
        if self.residual is None:
            return b""
        # The difference to the mean as it is stored, so that its rounding error is corrected too.
        mean = _among(factors_from_bytes(shared, self.quantizer).modules, adapter)
        return self.residual.encode(plus(adapter, times(mean, -1.0)), b"")

    def decode(self, code: bytes, shared: bytes) -> Adapter:
        """Return the mean; with differences, the mean of the modules that the task has, plus its difference."""
        mean = factors_from_bytes(shared, self.quantizer)
        if self.residual is not None:
            difference = self.residual.decode(code, b"")
            common = _among(mean.modules, difference)
            widths = {shape.module: shape[2:] for shape in difference.layout}
            if any(module.shape[2:] != widths[module.name] for module in common):
                raise CodeError("a module has other widths in the code than in the fleet's mean")
            return plus(difference, common)
        if code:
            raise CodeError("the task has a code, but this baseline stores only the fleet's mean")
        return mean


def _among(modules: Iterable[LoraModule], adapter: Adapter) -> list[LoraModule]:
    """Return those of some modules that an adapter has too."""
    own = {module.name for module in adapter.modules}
    return [module for module in modules if module.name in own]
