"""What could not be run on a base model, and why. Never stops what can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from icmlora.errors import BaseModelMismatch, BaseModelNotFound, BaseModelUnsuited, IcmLoraError
from icmlora.fleet.context import Event

# What libraries raise when they run a model on something that it was not made for, in addition to this package's own.
FAILURES = (IcmLoraError, RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError)


def as_error(error: Exception) -> IcmLoraError:
    """Return what a library raised as an error of this package, which a user can read."""
    if isinstance(error, IcmLoraError):
        return error
    first = next(iter(str(error).strip().splitlines()), "")
    return BaseModelMismatch(f"its base model fails on it: {type(error).__name__}: {first}")


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
