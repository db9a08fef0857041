"""All errors of the registry, and `IcmError`, the base class of every error that icm raises on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


class IcmError(Exception):
    """Base class of every error that icm raises on purpose; `icmlora.errors.IcmLoraError` derives from it.

    Attributes:
        message: The fact, in one sentence.
        path: The file or folder concerned, or None.
        hint: What to do next, or None.
    """

    def __init__(self, message: str, *, path: str | Path | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the complete state: subclass constructors do not take `args`."""
        return _unpickled, (type(self), self.args, self.__dict__)


def _unpickled(kind: type[IcmError], arguments: tuple[object, ...], state: dict[str, object]) -> IcmError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(state)
    return error


class RegistryError(IcmError):
    """Base class of the errors of this package."""


class StoreNotFound(RegistryError):
    """The path holds no store."""


class NotAStore(RegistryError):
    """The folder exists and holds something that is not a store."""


class StoreLocked(RegistryError):
    """Another process held the store or job lock until the lock timeout."""


class StoreTooNew(RegistryError):
    """A newer icm wrote the store; nothing was touched."""


class StoreTooOld(RegistryError):
    """An icm from before the first release wrote the store; nothing was touched."""


class StoreReadOnly(RegistryError):
    """A write to a store that is not writable or was opened read-only."""


class StoreFull(RegistryError):
    """No space left on the device; everything committed before is intact."""


class StoreIOError(RegistryError):
    """The operating system failed a read or write of the store."""


class StoreUnavailable(RegistryError):
    """The database or the blob storage did not answer, or refused; unlike one bad file, this ends a command."""


class DamagedStore(RegistryError):
    """The database or a file of the store is damaged."""


class MissingBlob(DamagedStore):
    """A ref or manifest refers to bytes that the store does not have."""


class DamagedBlob(DamagedStore):
    """The bytes of a blob do not match its digest."""


class SourceRefused(RegistryError):
    """A file from outside is not a plain, readable file within the limits."""

    Reason = Literal["unreadable", "symlink", "special-file", "limits", "changed"]

    def __init__(self, message: str, *, reason: Reason, path: str | Path | None = None, hint: str | None = None):
        super().__init__(message, path=path, hint=hint)
        self.reason = reason

    def __str__(self) -> str:
        return self.message if self.path is None else f"{self.path}: {self.message}"


class SourceChanged(SourceRefused):
    """A file from outside changed while it was read."""


class InvalidName(RegistryError):
    """A task name, tag or note is not valid."""


class InvalidFilter(RegistryError):
    """A filter or sort order is not valid."""


class TaskNotFound(RegistryError):
    """No task has that name; `matches` are the closest names that exist, best first."""

    def __init__(self, name: str, matches: tuple[str, ...] = (), *, hint: str | None = None) -> None:
        hint = hint or (f"did you mean {matches[0]!r}?" if matches else "run `icm ls` to list the tasks")
        super().__init__(f"no task is named {name!r}", hint=hint)
        self.name = name
        self.matches = matches


class TaskConflict(RegistryError):
    """A task of that name exists with another final adapter or base model."""

    def __init__(self, name: str, *, choices: str | None = "version|skip", fact: str | None = None) -> None:
        options = "" if choices is None else f", or use --on-conflict {choices}"
        hint = f"choose another name{options}" if fact is None else "choose another name"
        super().__init__(fact or f"task {name!r} already exists with a different adapter", hint=hint)
        self.name = name


class LostRace(RegistryError):
    """Another process changed the state first; nothing was written, and the change can be retried."""


class BaseModelConflict(RegistryError):
    """Labels of base models cannot be joined or separated as asked; nothing was changed."""


class GeneratorNotFound(RegistryError):
    """No generator has that number, or it was deleted."""


class GeneratorConflict(RegistryError):
    """Another generator is in use; a code can be decoded only with its own generator."""


class LastCopy(RegistryError):
    """The request would delete the last copy of a task's adapter; nothing was changed."""
