"""The results of encoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from icmlora.fleet.context import Event
from icmlora.fleet.results import Report
from registry.manifests import Code, Task, WithRelativeError

EncodeStatus = Literal["encoded", "below", "known", "evicted", "unmeasured", "changed", "original_only"]


class NewCode(NamedTuple):
    """A code that is not recorded yet."""

    seen: Task  # as it was encoded
    code: Code
    data: bytes


@dataclass(frozen=True)
class TaskEncoded(WithRelativeError, Event):
    """One task is done."""

    task: str
    # `encoded`: it has a new code, the smallest found that meets the limits. `known`: it had one already. `below`: no
    # code meets them, so it should keep its original; it has the most accurate code found, or with a `reason` its
    # earlier one. `evicted`: its original was evicted, so its code stays. `unmeasured`: see `reason`; its code stays.
    # `original_only`: it cannot have a code, see `reason`. `changed`: another process changed it, see `reason`.
    status: EncodeStatus
    size: int | None = None  # bytes of its code
    before: int | None = None  # bytes of its earlier code, if any
    squared_error: float | None = None
    effect: float | None = None  # share of its adapter's effect that its code keeps
    reason: str | None = None
    new: NewCode | None = field(default=None, repr=False)  # None in events and reports


@dataclass
class EncodeReport(Report[TaskEncoded]):
    """The results of `encode`; `done` has every task."""

    is_named: bool = False  # whether the tasks were named
    replaced_bytes: int = 0  # of codes and networks that no code needs any more

    @property
    def short(self) -> list[TaskEncoded]:
        """The tasks without a code that is known to meet the limits; unnamed ones only if they can have a code."""
        missed = ("below", "unmeasured", "changed", *(["original_only", "evicted"] if self.is_named else []))
        return [task for task in self.done if task.status in missed]

    @property
    def is_partial(self) -> bool:
        """Whether a task has no code that meets the limits."""
        return self.stopped or bool(self.short)
