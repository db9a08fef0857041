"""All errors of the registry, and `IcmError`, the base class of every error that icm raises on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


class IcmError(Exception):
    """Base class of every error that icm raises on purpose; `icmlora.errors.IcmLoraError` derives from it.

    Attributes:
        message: The fact, in one sentence.
        path: The file or folder it is about, or None.
        hint: What to do next, or None.
    """

    def __init__(self, message: str, *, path: str | Path | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the error as it is: the constructors of its subclasses take other arguments than `args`."""
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
    """Another process holds the store or a job and the lock timeout passed."""


class StoreTooNew(RegistryError):
    """A newer icm wrote the store; nothing was touched."""


class StoreTooOld(RegistryError):
    """An icm from before the first release wrote the store; nothing was touched."""


class StoreReadOnly(RegistryError):
    """A write to a store that was opened read-only, or that cannot be written."""


class StoreFull(RegistryError):
    """No space left on the device; everything committed before is intact."""


class StoreIOError(RegistryError):
    """The operating system failed a read or write of the store."""


class StoreUnavailable(RegistryError):
    """The database, or the place of the blobs, did not answer, or refused; unlike one bad file, this ends a command."""


class DamagedStore(RegistryError):
    """The database or the folder is not as it was left."""


class MissingBlob(DamagedStore):
    """A ref or a manifest refers to bytes that the store does not have."""


class DamagedBlob(DamagedStore):
    """The bytes of a blob do not have the digest that names them."""


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
    """A task name, a tag or a note does not follow the rule."""


class InvalidFilter(RegistryError):
    """A filter or an order of tasks cannot be understood."""


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
    """Another process changed what was to be replaced; nothing was written, and the change can be made again."""


class BaseModelConflict(RegistryError):
    """Labels of base models cannot be joined or separated as asked; nothing was changed."""


class GeneratorNotFound(RegistryError):
    """No generator has that number, or it was deleted."""


class GeneratorConflict(RegistryError):
    """The generator is not the one in use; a code can be decoded with its own generator only."""


class LastCopy(RegistryError):
    """The request would lose the last copy of a task's adapter; nothing was changed."""
