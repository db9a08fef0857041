"""One adapter for all tasks: the mean dW of the fleet, cut to a rank. A task's code is empty, or what the mean lacks.

shared = k strongest directions of mean(B_i A_i);   code = b"", or directions of B A - mean
"""

from __future__ import annotations

from dataclasses import dataclass

from icmlora.adapter import Adapter
from icmlora.arithmetic import among, mean_adapter, plus, times
from icmlora.baselines.baseline import Baseline, Fleet
from icmlora.baselines.factors import factors_from_bytes, factors_to_bytes
from icmlora.baselines.quantizers import Quantizer
from icmlora.errors import CodeError


@dataclass(frozen=True)
class FleetMean:
    """The mean of the fleet's dW, for every task.

    Attributes:
        rank: Directions kept of each module.
        quantizer: How the mean is stored.
        residual: How a task's difference to the mean is stored, a baseline that shares nothing; None stores nothing.
    """

    rank: int
    quantizer: Quantizer
    residual: Baseline | None = None

    def prepare(self, fleet: Fleet) -> bytes:
        """Store the mean over the modules that at least half of the tasks have; a task without one counts as zero.

        Raises:
            ValueError: The fleet is empty.
        """
        mean = mean_adapter((fleet[task] for task in fleet), self.rank)
        return factors_to_bytes(mean, self.quantizer)

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Store what the decoded mean lacks, if anything is stored."""
        if self.residual is None:
            return b""
        mean = among(factors_from_bytes(shared, self.quantizer).modules, adapter)
        return self.residual.encode(plus(adapter, times(mean, -1.0)), b"")

    def decode(self, code: bytes, shared: bytes) -> Adapter:
        """Return the mean, or the mean with a task's difference added, of the modules that the task has."""
        mean = factors_from_bytes(shared, self.quantizer)
        if self.residual is not None:
            difference = self.residual.decode(code, b"")
            return plus(difference, among(mean.modules, difference))
        if code:
            raise CodeError("a task has no code beside the fleet's mean")
        return mean
