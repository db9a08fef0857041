"""Fewer ranks: the strongest directions of each module's dW, balanced over the two factors, then quantised.

dW = sum s u v^T   ->   A' = sqrt(s) v^T,  B' = u sqrt(s)  of the first k
"""

from __future__ import annotations

from dataclasses import dataclass

from icmlora.adapter import Adapter
from icmlora.arithmetic import truncated
from icmlora.baselines.baseline import PerAdapter
from icmlora.baselines.factors import factors_from_bytes, factors_to_bytes
from icmlora.baselines.quantizers import Quantizer


@dataclass(frozen=True)
class Truncation(PerAdapter):
    """Keep `rank` directions of every module, or all where it has fewer."""

    rank: int
    quantizer: Quantizer

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Truncate and serialise one adapter."""
        return factors_to_bytes(truncated(adapter, self.rank), self.quantizer)

    def decode(self, code: bytes, shared: bytes) -> Adapter:
        """Read it back."""
        return factors_from_bytes(code, self.quantizer)
