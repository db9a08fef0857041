"""What a training reports: its events and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from icmlora.fleet.context import Event
from icmlora.fleet.encode.report import EncodeReport
from icmlora.fleet.failures import BaseModelFailed
from icmlora.fleet.measure.report import EvaluateReport, Measurable
from icmlora.fleet.results import Report
from registry.errors import IcmError
from registry.manifests import WithRelativeError

if TYPE_CHECKING:
    from icmlora.fewshot.meta_training import Episode
    from icmlora.training.loop import TrainStep


@dataclass(frozen=True)
class Resumed(Event):
    """An interrupted run continues from its checkpoint."""

    TYPE = "resumed"

    base_model: str
    step: int


@dataclass(frozen=True)
class Continued(Event):
    """Training starts from the current generator; `new_tasks` tasks have no code."""

    TYPE = "continued"

    base_model: str
    version: int
    new_tasks: int


@dataclass(frozen=True)
class CodeMade(WithRelativeError, Event):
    """One task is encoded; its code becomes current together with all others."""

    TYPE = "code"

    task: str
    size: int
    squared_error: float


@dataclass(frozen=True)
class Trained(Event):
    """A generator and its codes are current."""

    TYPE = "trained"

    base_model: str
    version: int
    generator: str
    generator_size: int
    tasks: int
    codes_size: int
    metrics: dict[str, object]
    # Whether the earlier generator had a few-shot start: a code of the earlier generator, so the new one has none.
    start_dropped: bool
    left_out: Mapping[str, str]
    earlier_codes: int = 0  # tasks that keep the code of an earlier generator
    replaced_bytes: int = 0  # of codes and networks that no code needs any more


@dataclass(frozen=True)
class Updated(Event):
    """The new tasks of a base model have codes."""

    TYPE = "updated"

    base_model: str
    version: int
    generator: str
    generator_size: int
    epochs: int
    added: Sequence[str]  # `tuned` for an appended decoder, `fresh` for an appended network
    tasks: Sequence[str]
    codes_size: int
    kept_size: int | None  # bytes of the codes of the earlier networks; None if they cover no new task
    tuned_size: int | None  # bytes of the codes under the tuned decoder and of that decoder; None if none was tuned
    metrics: dict[str, object]
    left_out: Mapping[str, str]
    replaced_bytes: int = 0  # of codes and networks that no code needs any more


@dataclass(frozen=True)
class FewShotTrained(Event):
    """A generator has a new few-shot start."""

    TYPE = "start"

    base_model: str
    generator: str
    start: str
    size: int
    tasks: int
    episodes: int
    loss: float  # mean over the last half of the episodes: 0 is as good as the task's own adapter, 1 as good as none
    seconds: float
    precision: str  # of the base model that the loss was measured on
    left_out: Mapping[str, str] = field(default_factory=dict)  # tasks that cannot be read, and why


@dataclass(frozen=True)
class StepDone(Event):
    """One optimiser step is done; `at` has the loss in bits per parameter of the adapter that this step drew."""

    base_model: str
    task: str
    mean_bits: float  # per parameter: the latest measurement of a few adapters, which are the same at every step
    at: TrainStep


@dataclass(frozen=True)
class EpisodeDone(Event):
    """One episode is done; `at` has its measurements."""

    base_model: str
    task: str
    at: Episode


@dataclass
class TrainReport(Report[Trained | Updated | FewShotTrained]):
    """The results of a training, one entry per base model, and of encoding and measuring after it."""

    failed_bases: list[BaseModelFailed] = field(default_factory=list)  # their generators did not change
    stopped_at: int | None = None  # step of the checkpoint of an interrupted run: 0 before its first step
    encoded: list[EncodeReport] = field(default_factory=list)  # once for limits, or for each base model refined
    measurable: Measurable | None = None  # tasks that this machine can measure; None before that is known
    evaluated: EvaluateReport | None = None
    evaluate_error: IcmError | None = None  # why none of the measurable tasks could be measured

    @property
    def trained(self) -> list[Trained]:
        """The generators that were trained on all tasks."""
        return [one for one in self.done if isinstance(one, Trained)]

    @property
    def updated(self) -> list[Updated]:
        """The generators that new tasks were added to."""
        return [one for one in self.done if isinstance(one, Updated)]

    @property
    def tasks(self) -> list[str]:
        """The tasks that updates gave a code."""
        return [name for one in self.updated for name in one.tasks]

    @property
    def is_partial(self) -> bool:
        """Whether something was left out, at any stage."""
        unmeasured = self.evaluate_error is not None or (self.evaluated is not None and self.evaluated.is_partial)
        short = any(one.is_partial for one in self.encoded)
        return self.stopped or bool(self.failed_bases) or short or unmeasured or any(one.left_out for one in self.done)
