"""The factors as trained, value by value: bf16, int8, nf4, 4 to 1 bits."""

from __future__ import annotations

from dataclasses import dataclass

from icmlora.adapter import Adapter
from icmlora.baselines.baseline import PerAdapter
from icmlora.baselines.factors import factors_from_bytes, factors_to_bytes
from icmlora.baselines.quantizers import Quantizer


@dataclass(frozen=True)
class Plain(PerAdapter):
    """Quantise A and B."""

    quantizer: Quantizer

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Serialise one adapter."""
        return factors_to_bytes(adapter, self.quantizer)

    def decode(self, code: bytes, shared: bytes) -> Adapter:
        """Read it back."""
        return factors_from_bytes(code, self.quantizer)
