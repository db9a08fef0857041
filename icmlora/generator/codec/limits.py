"""Limits on the errors and the size of a code."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

from icmlora.errors import OptionsConflict
from icmlora.generator.network.water_filling import WaterFilling
from icmlora.generator.scales import OCTAVE

_LARGE = 0.5  # larger squared errors grow more slowly than theory expects, as slots are left out


class Measured(Protocol):
    """An object with known errors."""

    @property
    def squared_error(self) -> float:
        """The square of the relative error of dW."""
        ...

    @property
    def weighted_error(self) -> float:
        """The same for dW weighted by the sensitivity of its channels."""
        ...


@dataclass(frozen=True)
class Limits:
    """Requirements for a code. It keeps all limits that are set; if none is set, the quality applies.

    Attributes:
        quality: 1 (smallest codes) to 8 (most accurate); it sets a share to keep, or without the base model a
            tolerance.
        max_error: Maximum relative error of dW.
        tolerance: Maximum squared error of dW weighted by the sensitivity of its channels; set by a quality.
        size: Maximum bytes of the code, which is as accurate as they allow.
        refine: Refinement steps. None means a suitable number for a quality or a share to keep, and none under other
            limits.
        keep: Minimum share of the adapter's effect; see `icmlora.training.effect`.
    """

    quality: int | None = None
    max_error: float | None = None
    tolerance: float | None = None
    size: int | None = None
    refine: int | None = None
    keep: float | None = None

    def __post_init__(self) -> None:
        """Raise `OptionsConflict` for limits that do not go together."""
        named = {"--quality": self.quality, "--keep": self.keep, "--max-error": self.max_error, "--size": self.size}
        given = [name for name, value in named.items() if value is not None]
        if self.refine and not self.is_by_quality and self.keep is None:
            given.append("--refine")
        if len(given) > 1 and given != ["--max-error", "--size"]:
            fact = f"{given[0]} cannot be combined with {' and '.join(given[1:])}"
            raise OptionsConflict(fact, hint="--max-error goes with --size; --refine with --quality or --keep")

    @property
    def is_by_quality(self) -> bool:
        """Whether no limit is set, so the quality applies."""
        return self.max_error is self.size is self.keep is None

    @property
    def max_squared_error(self) -> float | None:
        """The largest squared error of dW."""
        return None if self.max_error is None else self.max_error * self.max_error

    @property
    def least(self) -> float:
        """The smaller limit of the two squared errors."""
        limits = self.tolerance, self.max_squared_error
        return min((limit for limit in limits if limit is not None), default=math.inf)

    def keeps(self, encoded: Measured) -> bool:
        """Return whether the errors of a code are within the limits."""
        return all(error <= limit for error, limit in self._pairs(encoded))

    def used(self, encoded: Measured) -> float:
        """Return the share of the limits that a code's errors use: 1 if it just keeps them."""
        return max((error / limit for error, limit in self._pairs(encoded) if limit), default=1.0)

    def tighter(self) -> Limits:
        """Return the limits with squared errors reduced to nine tenths."""
        tolerance = self.tolerance and 0.9 * self.tolerance
        return replace(self, tolerance=tolerance, max_error=self.max_error and math.sqrt(0.9) * self.max_error)

    def expected_step(self, theory: WaterFilling, used: float = 1.0) -> float:
        """Return the step, in eighths of an octave, at which theory expects a share of the smaller limit to be used."""
        # At full strength, an adapter that lost the share e has the error e / (1 - e).
        error = used * self.least
        return OCTAVE * math.log2(theory.step(error / (1 + error)))

    def enough(self, theory: WaterFilling) -> float:
        """Return the used share of the limits at which theory expects the next coarser step to exceed them."""
        if self.least > _LARGE:
            return 1.0
        step = theory.step(self.least / (1 + self.least))
        following = theory.error(step * 2.0 ** (1 / OCTAVE))
        return theory.error(step) / following if following else 1.0

    def _pairs(self, encoded: Measured) -> list[tuple[float, float]]:
        """Return each error that has a limit, with the limit."""
        pairs = ((encoded.weighted_error, self.tolerance), (encoded.squared_error, self.max_squared_error))
        return [(error, limit) for error, limit in pairs if limit is not None]
