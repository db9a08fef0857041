"""The results of measuring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from icmlora.fleet.context import Event
from icmlora.fleet.results import Report
from icmlora.fleet.stats.bill import Spread

if TYPE_CHECKING:
    from icmlora.fleet.measure.measure import SourceResult
    from registry.manifests import Source


@dataclass(frozen=True)
class TaskEvaluated(Event):
    """One task is measured, and its results are recorded."""

    task: str
    sources: Mapping[Source, SourceResult]
    # After the task's context, if it has one; gains are shares of the gain of the original without it.
    with_context: Mapping[Source, SourceResult] = field(default_factory=dict)
    skipped: str | None = None
    precision: str | None = None  # of the base model, such as "float32" or "nf4"


@dataclass
class EvaluateReport(Report[TaskEvaluated]):
    """The results of `evaluate`."""

    without_data: list[str] = field(default_factory=list)
    without_original: list[str] = field(default_factory=list)
    outdated: list[str] = field(default_factory=list)

    def gain_of(self, source: str) -> Spread | None:
        """Sum up the retained gain of one source; None where no task has one."""
        return Spread.of(
            (task.task, result.retained_gain, task.precision)
            for task in self.done
            for name, result in task.sources.items()
            if name == source
        )


@dataclass(frozen=True)
class Measurable:
    """Tasks that this machine can measure, why it cannot measure others, and base models to measure elsewhere."""

    tasks: list[str]
    reasons: list[str]
    elsewhere: list[str]
