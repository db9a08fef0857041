"""The report of a use case: one type from the work to the table, the JSON lines and the exit code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from icmlora.fleet.context import TaskFailed

T = TypeVar("T")


@dataclass
class Skipped:
    """Tasks that were not processed, for one reason."""

    kind: str  # a short stable word for the reason
    tasks: list[str]
    reason: str
    hint: str | None = None
    is_problem: bool = False  # whether the user asked for more than was done
    base_model: str | None = None  # if the reason is one of its base model


@dataclass
class Report(Generic[T]):
    """The results of a use case. It covers everything that finished, also if the user stopped it."""

    done: list[T] = field(default_factory=list)
    failed: list[TaskFailed] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopped: bool = False

    @property
    def is_partial(self) -> bool:
        """Whether something that was asked for was not done."""
        return self.stopped or bool(self.failed) or any(group.is_problem for group in self.skipped)

    def skip(self, kind: str, task: str, reason: str, *, is_problem: bool = False) -> None:
        """Add a task to the skipped ones with the same reason."""
        for group in self.skipped:
            if (group.kind, group.reason, group.base_model) == (kind, reason, None):
                group.tasks.append(task)
                return
        self.skipped.append(Skipped(kind, [task], reason, is_problem=is_problem))
