"""The events and the report of an ingest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from icmlora.fleet.context import Event
from icmlora.fleet.results import Report

if TYPE_CHECKING:
    from icmlora.fleet.bases.joins import BaseJoined
    from icmlora.fleet.ingest.files import TextRead
    from icmlora.fleet.vectors.vectors import VectorReport

OnConflict = Literal["version", "skip", "fail"]


@dataclass(frozen=True)
class TaskIngested(Event):
    """A task is in the store now, or would be after a dry run."""

    TYPE = "task"

    task: str  # as the store spells it
    # `added`; `updated`; `known`; `version` (a new one); `skipped`; `decoded` (it is what the task's code decodes to)
    status: str
    new: int  # adapters that were not in the store
    known: int
    size: int = 0  # bytes of all its adapters' files
    evicted: int = 0  # known adapters that stay evicted
    restored: int = 0
    samples: TextRead | None = None
    eval_data: TextRead | None = None
    folder: str = ""  # the task is named after it
    is_renamed: bool = False  # the task has another name than the folder
    base_model: str = ""  # its name, whichever label the adapter gives it
    base_is_guess: bool = False  # nothing names the base model; the shapes of the tensors make it likely
    original_only: str | None = None  # why it cannot have a code
    extras_size: int = 0  # bytes of its extras in the store; equal ones are stored once
    lora_size: int = 0  # bytes of the factors of its final adapter; 0 if it cannot have a code
    converted_from: str | None = None  # the name of the pickle that its weights were converted from
    initial: str | None = None  # the folder with its initial weights, which were subtracted
    format: str = "peft"
    wrapper: str | None = None  # prefix of a wrapper in the names of its tensors, such as `_orig_mod`
    same_as: str | None = None  # another task whose final adapter has the same tensors, for a new adapter
    same_as_final: tuple[int, ...] = ()  # steps of the checkpoints whose tensors equal the final adapter's
    version: int = 1


@dataclass(frozen=True)
class InputProblem(Event):
    """A refused input."""

    TYPE = "problem"

    path: str
    kind: str
    message: str
    hint: str | None
    task: str | None = None  # the task that was ingested without it, such as a damaged checkpoint


@dataclass(frozen=True)
class PlaceholderMet(Event):
    """A placeholder of `icm evict --placeholder` that was skipped, because it has no adapter."""

    TYPE = "placeholder"

    path: str
    task: str  # the task that it names
    passed_over: int  # adapters of the same run that were skipped, because the final one is not there


@dataclass
class IngestReport(Report[TaskIngested]):
    """The results of an ingest."""

    found: int = 0
    joined: list[BaseJoined] = field(default_factory=list)  # new labels that mean a known base model
    # Groups of base models with similar names, one of them new. They stay separate.
    lookalikes: list[list[str]] = field(default_factory=list)
    problems: list[InputProblem] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)  # one for each problem
    placeholders: list[PlaceholderMet] = field(default_factory=list)
    # Files next to adapters that belong to neither an adapter nor its trainer: name -> number of files.
    not_kept: Mapping[str, int] = field(default_factory=dict)
    without_vectors: list[str] = field(default_factory=list)
    bases_not_found: list[str] = field(default_factory=list)  # base models of those tasks, missing on this machine
    vectors: VectorReport | None = None  # of the tasks that task vectors were extracted for

    @property
    def is_partial(self) -> bool:
        """Whether something that was asked for was not done."""
        return super().is_partial or bool(self.problems) or (self.vectors is not None and self.vectors.is_partial)

    @property
    def new(self) -> int:
        """Adapters that were recorded."""
        return sum(task.new for task in self.done)

    @property
    def known(self) -> int:
        """Adapters that the store already had."""
        return sum(task.known for task in self.done)

    @property
    def evicted(self) -> int:
        """Known adapters that stay evicted."""
        return sum(task.evicted for task in self.done)

    @property
    def restored(self) -> int:
        """Evicted adapters whose weights are in the store again."""
        return sum(task.restored for task in self.done)

    @property
    def size(self) -> int:
        """Bytes of all adapters that were recorded or already known."""
        return sum(task.size for task in self.done)
