"""Collect failed tasks; continue with the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from icmlora.base_models.kinds.custom_model import CustomModality
from icmlora.errors import BaseModelMismatch, BaseModelNotFound, BaseModelUnsuited, Cancelled, IcmLoraError
from icmlora.fleet.context import Context, Event, TaskFailed
from icmlora.fleet.results import Report, Skipped
from icmlora.io.memory import is_on_card, out_of_memory, ran_out
from registry.errors import DamagedStore, IcmError

if TYPE_CHECKING:
    from icmlora.base_models.modality import BaseModel
    from registry.manifests import Task

R = TypeVar("R")

_OF_LIBRARIES = (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, MemoryError)
FAILURES = (IcmLoraError, DamagedStore, *_OF_LIBRARIES)
"""What can go wrong with one task: this package's own errors, bytes in the store that are damaged or gone, and what
libraries raise when they run a model on something that it was not made for."""


def as_error(error: Exception, base: BaseModel | None = None, *, less: str | None = None) -> IcmError:
    """Return what a library raised as an error that a user can read.

    Args:
        error: One of `FAILURES`. If memory ran out, what was in use is freed for the next task.
        base: The base model that was run, if one was.
        less: An option of the command with which it takes less memory.
    """
    if isinstance(error, IcmError):
        return error
    if ran_out(error):
        found = [] if less is None else [less]
        if base is not None and base.load_in is None and not isinstance(base.modality, CustomModality):
            found.append(f"run `icm base add {base.label} PATH --load-in nf4` to load the base model in 4 bits")
        found.append("use --device cpu" if is_on_card(error) else "use a machine with more memory")
        return out_of_memory(error, ", or ".join(found))
    first = next(iter(str(error).strip().splitlines()), "")
    return BaseModelMismatch(f"its base model failed on it: {type(error).__name__}: {first}")


@dataclass(frozen=True)
class Failed:
    """What comes of a task on which something fails, instead of a result; the others go on."""

    error: IcmError


@dataclass(frozen=True)
class BaseUnavailable:
    """What comes of a task whose base model cannot be loaded or run, instead of a result."""

    error: BaseModelNotFound | BaseModelUnsuited


def skipped_base(base_model: str, tasks: Sequence[str], error: BaseModelNotFound | BaseModelUnsuited) -> Skipped:
    """Return the tasks of a base model that cannot be loaded or run. A kind that icm cannot run is no problem."""
    is_problem = not isinstance(error, BaseModelUnsuited)
    return Skipped("base_model_left_out", list(tasks), error.message, error.hint, is_problem, base_model)


@dataclass(frozen=True)
class BaseModelFailed(Event):
    """Nothing was done for the tasks of one base model; the other base models go on."""

    base_model: str
    kind: str  # a short stable word for the reason
    message: str
    hint: str | None


@contextmanager
def one_of_several(
    context: Context, failed: list[BaseModelFailed], base_model: str, all_: Sequence[str]
) -> Iterator[None]:
    """Do the work for one base model in the block; what is wrong with it is noted, so that the others go on.

    Raises:
        IcmError: What the block raised, if nothing could be done for any of them.
    """
    try:
        yield
    except Cancelled:
        raise
    except (IcmLoraError, DamagedStore) as error:
        if len(failed) + 1 == len(all_):
            raise
        failure = TaskFailed.of(base_model, error)
        failed.append(BaseModelFailed(base_model, failure.kind, failure.message, failure.hint))
        context.on_event(failed[-1])


@dataclass
class FailureLog:
    """Notes in a report which tasks have no result, and lets the results of the others through."""

    context: Context
    report: Report[Any]
    total: int  # tasks of all base models
    _missing: list[BaseModelNotFound] = field(default_factory=list)

    def results(
        self, base_model: str, made: Iterable[tuple[Task, R | Failed | BaseUnavailable]]
    ) -> Iterator[tuple[Task, R]]:
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
            self.report.skipped.append(skipped_base(base_model, list(unavailable), first))

    def check(self, base_models: int) -> None:
        """Raise `BaseModelNotFound` if none of so many base models was found."""
        if self._missing and len(self._missing) == base_models:
            raise self._missing[0]
