"""Signs for both factors and scales for their channels, after LoRDBA (Fujisawa et al., arXiv 2605.24058).

    dW ~ diag(o) S diag(d) T diag(i)      S (out, k) and T (k, in) of signs; scales o (out), d (k), i (in) in bfloat16
    head | per module:  signs of T, then of S^T | d | i | o

This is the method as we read its abstract: "binary sign carriers" with "channel-wise scales", two products with signs
interleaved with scaling. It is fitted to finished adapters here, where the paper also trains it. We start from the
signs of the balanced directions, as the paper's error bound suggests, and go down in squared error of dW: scales of one
side by least squares, signs of one rank channel at a time. No step can make the error larger.

Scales of the input and output channels are 16 bits for k signs, so they are most of the bytes: without `channels`
only the rank channels have some.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from icmlora.adapter.arithmetic import truncated
from icmlora.adapter.model import Adapter, LoraModule
from tests.benchmarks.baselines.baseline import PerAdapter
from tests.benchmarks.baselines.head import ByteReader, Head
from tests.benchmarks.baselines.quantizers import Bf16, pack, packed_size, unpack

_SWEEPS = 30
_EMPTY = 1e-30
_SCALES = Bf16()


@dataclass(frozen=True)
class DoubleBinary(PerAdapter):
    """Keep the `rank` strongest directions of each module, or all if it has fewer, as signs and scales."""

    rank: int
    channels: bool = True  # whether inputs and outputs have scales, or rank channels alone
    full: bool = False  # dW of each module gets its full length along the original, which no publication has

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Fit and serialise one adapter."""
        kept = truncated(adapter, self.rank)
        parts = [Head.of(kept).to_bytes()]
        for module in kept.modules:
            fit = _Fit(module)
            for _ in range(_SWEEPS):
                fit.sweep(channels=self.channels)
            if self.full:
                fit.strengthen()
            parts += [_packed(fit.t), _packed(fit.s), _SCALES.encode(fit.d[None])]
            if self.channels:
                parts += [_SCALES.encode(fit.i[None]), _SCALES.encode(fit.o[None])]
        return b"".join(parts)

    def decode(self, code: bytes, shared: bytes) -> Adapter:
        """Read it back."""
        reader = ByteReader(code)
        head = Head.read(reader)
        modules = []
        for name, rank, inputs, outputs in head.layout:
            t, s = (_unpacked(reader, rank, width) for width in (inputs, outputs))
            d = _read_scales(reader, rank)
            i, o = (_read_scales(reader, width) if self.channels else torch.ones(width) for width in (inputs, outputs))
            root = d.abs().sqrt()
            modules.append(LoraModule(name, root[:, None] * t * i, ((d / root.clamp_min(_EMPTY))[:, None] * s * o).mT))
        reader.finish()
        return head.with_modules(modules)


class _Fit:
    """Signs and scales of one module while they are fitted. Both factors are rows: T and S^T, shapes (k, width)."""

    def __init__(self, module: LoraModule) -> None:
        self._a, self._b = module.a.double(), module.b.mT.double()  # (k, in), (k, out)
        self.t, self.s = (torch.where(rows >= 0, 1.0, -1.0).double() for rows in (self._a, self._b))
        self.d = torch.ones(len(self._a), dtype=torch.float64)
        self.i, self.o = (torch.ones(rows.shape[1], dtype=torch.float64) for rows in (self._a, self._b))
        self._solve_rank_scales()

    def sweep(self, *, channels: bool) -> None:
        """Improve every part once."""
        for side in ("t", "s"):
            rows, scales = ("t", "i") if side == "t" else ("s", "o")
            target, gram = self._seen(side)
            signs, factors = getattr(self, rows), getattr(self, scales)
            _improve_signs(signs, factors, target, gram)
            if channels:  # the least error of each channel, given all else
                explained = (signs * (gram @ signs)).sum(0)
                setattr(self, scales, (signs * target).sum(0) / explained.clamp_min(_EMPTY))
            self._solve_rank_scales()

    def strengthen(self) -> None:
        """Give dW its full length along the original."""
        t, s = self.t * self.i, self.s * self.o
        overlap = float((self.d * ((s @ self._b.mT) * (t @ self._a.mT)).sum(1)).sum())
        if overlap > 0:
            self.d *= float(((self._b @ self._b.mT) * (self._a @ self._a.mT)).sum()) / overlap

    def _seen(self, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return L^T dW (k, width) and L^T L (k, k) where L is all that stands on the other side of the signs."""
        if side == "t":
            other = self.d[:, None] * self.s * self.o  # L^T, shape (k, out)
            return (other @ self._b.mT) @ self._a, other @ other.mT
        other = self.d[:, None] * self.t * self.i
        return (other @ self._a.mT) @ self._b, other @ other.mT

    def _solve_rank_scales(self) -> None:
        t, s = self.t * self.i, self.s * self.o
        gram = (t @ t.mT) * (s @ s.mT)
        wanted = ((s @ self._b.mT) * (t @ self._a.mT)).sum(1)
        self.d = torch.linalg.lstsq(gram, wanted[:, None], driver="gelsd").solution[:, 0]


def _improve_signs(signs: torch.Tensor, factors: torch.Tensor, target: torch.Tensor, gram: torch.Tensor) -> None:
    """Choose the signs of one rank channel after the other, given all others; in place, shape (k, width)."""
    for row in range(len(signs)):
        rest = gram[row] @ signs - gram[row, row] * signs[row]
        # With x = factor * sign the error is x^2 g - 2 x (target - factor * rest) + ..., so the sign is the bracket's.
        wanted = factors * (target[row] - factors * rest)
        signs[row] = torch.where(wanted == 0, signs[row], wanted.sign())


def _packed(signs: torch.Tensor) -> bytes:
    return pack((signs > 0).numpy().astype(np.uint8), 1)


def _unpacked(reader: ByteReader, rows: int, columns: int) -> torch.Tensor:
    bits = unpack(reader.take(packed_size(rows * columns, 1)), 1, rows * columns)
    return torch.from_numpy(bits.astype(np.float32)).reshape(rows, columns) * 2 - 1


def _read_scales(reader: ByteReader, count: int) -> torch.Tensor:
    return _SCALES.decode(reader.take(_SCALES.size(1, count)), 1, count)[0]
