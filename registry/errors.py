"""Everything the registry can refuse or find wrong.

RegistryError
├── StoreNotFound      there is no store at the path
├── NotAStore          the folder holds something else
├── StoreLocked        another process holds the lock and the timeout passed
├── StoreTooNew        written by a newer icm
├── StoreReadOnly      a write was asked of a store that cannot be written
├── StoreFull          no space left; what was committed before is intact
├── StoreIOError       the operating system failed a read or a write
├── DamagedStore       the database or the folder is not as icm left it
│   ├── MissingBlob    a committed row refers to bytes that are gone
│   └── DamagedBlob    the bytes of a blob are not those of its digest
├── SourceRefused      a file offered to the store is no plain readable file
│   └── SourceChanged  it changed while it was read
├── InvalidName        a task name outside the rule
├── TaskNotFound       no task of that name
├── TaskConflict       the task exists with another adapter
├── GeneratorNotFound  no generator of that number
├── GeneratorConflict  another generator of the base model is in use
├── CodeChanged        a task got another code while something was made for its present one
└── LastCopy           what was asked for would lose the last copy of an adapter
"""

from __future__ import annotations

from pathlib import Path


class RegistryError(Exception):
    """Base of all errors of this package.

    Attributes:
        path: the file or folder the fact is about, if there is one.
        hint: the next step for the user, if there is one.
    """

    def __init__(self, message: str, *, path: Path | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.hint = hint


class StoreNotFound(RegistryError):
    """There is no store at the path."""


class NotAStore(RegistryError):
    """The folder exists and holds something that is not a store."""


class StoreLocked(RegistryError):
    """Another process holds the store and the lock timeout passed."""


class StoreTooNew(RegistryError):
    """The store was written by a newer version; nothing was touched."""


class StoreReadOnly(RegistryError):
    """A write was asked of a store that was opened, or can only be, read-only."""


class StoreFull(RegistryError):
    """No space left on the device; everything committed before is intact."""


class StoreIOError(RegistryError):
    """The operating system failed a read or write of the store."""


class DamagedStore(RegistryError):
    """The database or the folder is not as it was left."""


class MissingBlob(DamagedStore):
    """The bytes of a digest are not in the store."""


class DamagedBlob(DamagedStore):
    """The bytes of a blob do not have the digest that names them."""


class SourceRefused(RegistryError):
    """A file offered to the store is not a plain readable file within the limits."""


class SourceChanged(SourceRefused):
    """A file offered to the store changed while it was read."""


class InvalidName(RegistryError):
    """A task name does not follow the rule."""


class TaskNotFound(RegistryError):
    """No task has that name.

    Attributes:
        matches: the closest names that exist, best first.
    """

    def __init__(self, name: str, matches: tuple[str, ...] = ()) -> None:
        hint = f"did you mean {matches[0]!r}?" if matches else "`icm ls` lists the tasks"
        super().__init__(f"no task is named {name!r}", hint=hint)
        self.name = name
        self.matches = matches


class TaskConflict(RegistryError):
    """A task of that name exists with another final adapter or base model."""

    def __init__(self, name: str, *, choices: str | None = "skip|replace") -> None:
        options = "" if choices is None else f", or say what to do with --on-conflict {choices}"
        hint = f"give the new one another name{options}"
        super().__init__(f"task {name!r} is in the store with another adapter", hint=hint)
        self.name = name


class GeneratorNotFound(RegistryError):
    """There is no such generator (any more)."""


class GeneratorConflict(RegistryError):
    """Codes were offered whose generator is not the one in use; no code is readable under two."""


class CodeChanged(RegistryError):
    """What was offered belongs to a code or an adapter that a task does not have any more; nothing was changed."""


class LastCopy(RegistryError):
    """What was asked for would lose the last copy of a task's adapter; nothing was changed."""
