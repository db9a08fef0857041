"""What could not be run on a base model, and why. Never stops what can."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from icmlora.errors import BaseModelMismatch, BaseModelNotFound, BaseModelUnsuited, IcmLoraError
from icmlora.fleet.context import Context, Event, TaskFailed

if TYPE_CHECKING:
    from registry.records import TaskRecord

R = TypeVar("R")

# What libraries raise when they run a model on something that it was not made for, in addition to this package's own.
FAILURES = (IcmLoraError, RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError)


def as_error(error: Exception) -> IcmLoraError:
    """Return what a library raised as an error of this package, which a user can read."""
    if isinstance(error, IcmLoraError):
        return error
    first = next(iter(str(error).strip().splitlines()), "")
    return BaseModelMismatch(f"its base model fails on it: {type(error).__name__}: {first}")


@dataclass(frozen=True)
class Failed:
    """What comes of a task on which something fails, instead of a result; the others go on."""

    error: IcmLoraError


@dataclass(frozen=True)
class BaseUnavailable:
    """What comes of a task whose base model cannot be loaded or run, instead of a result."""

    error: BaseModelNotFound | BaseModelUnsuited


@dataclass(frozen=True)
class BaseModelLeftOut(Event):
    """The tasks of one base model could not be run."""

    base_model: str
    tasks: Sequence[str]
    reason: str
    hint: str | None
    # Whether there is nothing to mend: icm cannot run models of this kind.
    is_unsuited: bool

    @classmethod
    def because_of(
        cls, base_model: str, tasks: Sequence[str], error: BaseModelNotFound | BaseModelUnsuited
    ) -> BaseModelLeftOut:
        """Describe an exception."""
        return cls(base_model, tuple(tasks), error.message, error.hint, isinstance(error, BaseModelUnsuited))


class _Report(Protocol):
    failed: list[TaskFailed]
    left_out: list[BaseModelLeftOut]


@dataclass
class Sieve:
    """Notes in a report which tasks have no result, and lets the results of the others through."""

    context: Context
    report: _Report
    total: int  # tasks of all base models
    _missing: list[BaseModelNotFound] = field(default_factory=list)

    def results(
        self, base_model: str, made: Iterable[tuple[TaskRecord, R | Failed | BaseUnavailable]]
    ) -> Iterator[tuple[TaskRecord, R]]:
        """Yield the tasks of a base model that have a result. If there is only one task at all, raise its error."""
        unavailable: dict[str, BaseModelNotFound | BaseModelUnsuited] = {}
        for task, result in made:
            if isinstance(result, BaseUnavailable):
                unavailable[task.name] = result.error
            elif not isinstance(result, Failed):
                yield task, result
            elif self.total == 1:  # there are no others that could go on
                raise result.error
            else:
                self.report.failed.append(TaskFailed.of(task.name, result.error))
                self.context.on_event(self.report.failed[-1])
        if unavailable:
            first = next(iter(unavailable.values()))
            self._missing += [first] if isinstance(first, BaseModelNotFound) else []
            self.report.left_out.append(BaseModelLeftOut.because_of(base_model, list(unavailable), first))

    def check(self, base_models: int) -> None:
        """Raise `BaseModelNotFound` if none of so many base models was found."""
        if self._missing and len(self._missing) == base_models:
            raise self._missing[0]
