"""Mixed precision after LoRAQuant (Mirzaei et al., arXiv 2510.26690).

    dW = sum s u v^T;   the first h directions that hold a share of sum s^2: 2 or 3 bits;   the others: 1 bit
    head | h of each module (1 byte each) | A, B^T of the first h | A, B^T of the others, module by module

Scales are shared by 128 values, as in the paper. Two things favour the method compared with the paper: levels are
symmetric, so no zero points are stored, and the clip is searched. The paper's gradient steps on the scales are left
out; a searched clip and the scale of least error do the same for a given direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from icmlora.adapter.canonical import canonicalize
from icmlora.adapter.model import Adapter, LoraModule
from tests.benchmarks.baselines.baseline import PerAdapter
from tests.benchmarks.baselines.head import ByteReader, Head
from tests.benchmarks.baselines.quantizers import Uniform, ValueQuantizer


@dataclass(frozen=True)
class MixedPrecision(PerAdapter):
    """Spend more bits on the directions that carry the share `ratio` of a module's energy."""

    bits: int  # bits for these directions, 2 to 4; the others get 1
    ratio: float = 0.9  # the share
    full: bool = False  # use scales at full strength, which the paper does not; see `Uniform`

    _GROUP: ClassVar[int] = 128  # values that share a scale

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Split, quantise and serialise one adapter."""
        balanced = canonicalize(adapter)  # rows of A and columns of B in the order of falling singular values
        counts = [_carriers(module, self.ratio) for module in balanced.modules]
        parts = [Head.of(balanced).to_bytes(), bytes(counts)]
        for module, count in zip(balanced.modules, counts, strict=True):
            for quantizer, chosen in zip(self._quantizers(), (slice(count), slice(count, None)), strict=True):
                parts += [quantizer.encode(module.a[chosen]), quantizer.encode(module.b.mT[chosen])]
        return b"".join(parts)

    def decode(self, code: bytes, shared: bytes) -> Adapter:
        """Read it back."""
        reader = ByteReader(code)
        head = Head.read(reader)
        counts = reader.take(len(head.layout))
        modules = []
        for (name, rank, inputs, outputs), count in zip(head.layout, counts, strict=True):
            halves = [
                (_read(reader, quantizer, rows, inputs), _read(reader, quantizer, rows, outputs))
                for quantizer, rows in zip(self._quantizers(), (count, max(rank - count, 0)), strict=True)
            ]
            a, b = (torch.cat(parts) for parts in zip(*halves, strict=True))
            modules.append(LoraModule(name, a, b.mT.contiguous()))
        reader.finish()
        return head.with_modules(modules)

    def _quantizers(self) -> tuple[ValueQuantizer, ValueQuantizer]:
        return Uniform(self.bits, self._GROUP, self.full), Uniform(1, self._GROUP, self.full)


def _read(reader: ByteReader, quantizer: ValueQuantizer, rows: int, columns: int) -> torch.Tensor:
    return quantizer.decode(reader.take(quantizer.size(rows, columns)), rows, columns)


def _carriers(module: LoraModule, ratio: float) -> int:
    """Return how many leading directions of a balanced module hold the share `ratio` of its energy."""
    energy = module.a.double().square().sum(dim=1).square()  # s^2: a row of A has the squared norm s
    if not energy.sum() > 0:
        return 0
    # Rounding may leave the last partial sum a little below the whole.
    reached = int((energy.cumsum(0) < ratio * energy.sum() * (1 - 1e-12)).sum()) + 1
    return min(reached, len(energy), 255)
