"""What the store takes and returns about originals that it lets go of; the other values are in `registry.records`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from registry import records


@dataclass(frozen=True)
class EvictedAdapter:
    """What tells an evicted adapter when it is met again; attributes as in :class:`registry.records.AdapterRecord`."""

    task: str
    weights: str
    config: str
    step: int | None
    is_final: bool


@dataclass(frozen=True)
class Eviction:
    """Originals to be let go, and what was found to stand in for them.

    Attributes:
        task: the task.
        adapters: numbers of its adapters whose weights go.
        code: the code that stands in, with its residual if it has one, as they were read and decoded.
        generator: the generator that decodes it, likewise.
        dw_error: relative squared error of dW that was measured on what they decode to.
        evaluations: what else was measured.
    """

    task: str
    adapters: Sequence[int]
    code: records.CodeRecord
    generator: records.GeneratorRecord
    dw_error: float
    evaluations: Sequence[records.NewEvaluation] = ()

    def digests(self) -> list[str]:
        """Return the digests of everything that stands in."""
        beside = [] if self.code.residual is None else [self.code.residual.blob]
        return [self.generator.blob, self.code.blob, *beside]
