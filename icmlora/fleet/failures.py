"""What could not be run on a base model, and why. Never stops what can."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from icmlora.base_models.custom_model import CustomModality
from icmlora.errors import BaseModelMismatch, BaseModelNotFound, BaseModelUnsuited, IcmLoraError
from icmlora.fleet.context import Context, Event, TaskFailed
from icmlora.io.memory import is_on_card, out_of_memory, ran_out

if TYPE_CHECKING:
    from icmlora.base_models.modality import BaseModel
    from registry.records import TaskRecord

R = TypeVar("R")

# What libraries raise when they run a model on something that it was not made for, in addition to this package's own.
FAILURES = (IcmLoraError, RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, MemoryError)


def as_error(error: Exception, base: BaseModel | None = None, *, less: str | None = None) -> IcmLoraError:
    """Return what a library raised as an error of this package, which a user can read.

    Args:
        error: One of `FAILURES`. If memory ran out, what was in use is freed for the next task.
        base: The base model that was run, if one was.
        less: An option of the command with which it takes less memory.
    """
    if isinstance(error, IcmLoraError):
        return error
    if ran_out(error):
        return out_of_memory(error, _helps(base, less, on_card=is_on_card(error)))
    first = next(iter(str(error).strip().splitlines()), "")
    return BaseModelMismatch(f"its base model fails on it: {type(error).__name__}: {first}")


def _helps(base: BaseModel | None, less: str | None, *, on_card: bool) -> str:
    """Say which options take less memory, those first that cost least."""
    found = [] if less is None else [less]
    if base is not None and base.load_in is None and not isinstance(base.modality, CustomModality):
        found.append(f"`icm base add {base.label} PATH --load-in nf4` loads the base model in 4 bits")
    found.append("--device cpu has the memory of this machine" if on_card else "a machine with more memory")
    return ", or ".join(found)


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
