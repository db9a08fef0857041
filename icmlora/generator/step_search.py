"""The coarsest quantiser step whose bytes keep a limit, found by trying."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from icmlora.errors import GeneratorError
from icmlora.generator.objective import water_level
from icmlora.generator.scales import OCTAVE
from icmlora.generator.sensitivity import Sensitivity
from icmlora.generator.span import Span
from icmlora.generator.tokens import KindTokens

# Steps tried above and below the one that theory gives for a tolerance, in eighths of an octave.
_BELOW, _ABOVE = 4 * OCTAVE, 2 * OCTAVE
# How often the search goes down by `_BELOW` again: 2^-16 of the expected step is below what float32 resolves.
_RETRIES = 3


@dataclass(frozen=True)
class Encoded:
    """A code, or a residual beside one, and what it keeps of its adapter."""

    data: bytes
    dw_error: float
    """Relative squared error of dW, of the adapter decoded from it."""
    weighted_error: float
    """The same of dW weighted by the sensitivity of its channels; equal to it under even weights."""


@dataclass(frozen=True)
class Limits:
    """What has to be kept; at least one of the two."""

    tolerance: float | None = None
    """Largest weighted error."""
    max_error: float | None = None
    """Largest relative dW error."""

    @property
    def least(self) -> float:
        """The smaller limit."""
        return min(math.inf if limit is None else limit for limit in (self.tolerance, self.max_error))

    def keeps(self, encoded: Encoded) -> bool:
        """Say whether a code keeps them."""
        pairs = ((encoded.weighted_error, self.tolerance), (encoded.dw_error, self.max_error))
        return all(limit is None or error <= limit for error, limit in pairs)

    def expected_step(self, tokens: Sequence[KindTokens], sensitivity: Sensitivity, span: Span) -> int:
        """Return the step, in eighths of an octave, that theory gives for the smaller limit."""
        return math.floor(OCTAVE * math.log2(water_level(tokens, self.least, sensitivity, span)))


def coarsest(expected: int, limits: Limits, encode: Callable[[int], Encoded]) -> Encoded:
    """Return what the coarsest step that keeps the limits gives, found by bisection.

    Args:
        expected: Where the search begins.
        limits: What has to be kept.
        encode: Makes the code, or the residual, of one step.

    Raises:
        GeneratorError: No step does.
    """
    low, high = expected - _BELOW, expected + _ABOVE
    best = encode(low)
    for _ in range(_RETRIES):
        if limits.keeps(best):
            break
        low, high = low - _BELOW, low - 1
        best = encode(low)
    if not limits.keeps(best):
        raise GeneratorError(f"no code keeps an error of {limits.least:g}", hint="allow a larger error")
    while low < high:  # a coarser step loses more, nearly always; `best` keeps the limits in any case
        middle = (low + high + 1) // 2
        tried = encode(middle)
        if limits.keeps(tried):
            low, best = middle, tried
        else:
            high = middle - 1
    return best
