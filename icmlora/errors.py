"""All errors that `icmlora` raises on purpose. Each states a fact, the path it is about, and what to do next.

registry.errors.IcmError     message, path, hint; catch it to catch everything that icm raises on purpose
├── registry.errors.RegistryError    errors of the store, drawn in that file
└── IcmLoraError
    ├── AdapterRefused       an adapter that could not be given back exactly (kind: "dora", "bias", "shape", ...)
    │   └── UnsafeInput      input that is refused for safety (kind: "pickle", "symlink", "limits", ...)
    ├── OutputExists         the output folder or file exists already
    ├── BaseModelNotFound    no local copy of the base model that an adapter names
    ├── BaseModelMismatch    the base model lacks a module of the adapter, or has it in another shape
    ├── BaseModelUnsuited    a base model of a kind that icm cannot run, such as an encoder
    ├── DeviceUnavailable    the machine does not have the device
    ├── OutOfMemory          the memory of a card or of this machine ran out
    ├── GeneratorError       a generator that cannot be made, read or used as asked
    │   └── NotCovered       an adapter with a module, layer or rank that the generator does not cover
    ├── CodeError            a code that is damaged or belongs to another generator
    ├── OtherFormat          a file in a format that another version of icm reads, and this one does not
    ├── BundleError          a bundle that is damaged, cut short or of another format
    ├── DataError            samples or held-out text that cannot be used
    │   └── OptionsConflict  options that contradict each other
    ├── NotRecognized        samples that belong to none of the known tasks
    ├── InvalidShard         text that is not a shard such as 1/8
    ├── InvalidWorkers       neither a number nor an address of workers
    ├── WorkerDied           a worker died with a task, as often as the task was tried
    ├── WorkersUnavailable   no workers can be started, or reached
    ├── OtherProcessFailed   another process of the same training failed or was killed
    ├── FoldersUnusable      the folders for served adapters are full, or another user's
    ├── FoldersInUse         another server has the folders for served adapters
    └── Cancelled            the caller asked to stop; what was finished is stored
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.errors import IcmError
from registry.names import escape


class IcmLoraError(IcmError):
    """Base class of the errors of this package; `str` gives the path and the message."""

    def __str__(self) -> str:
        return self.message if self.path is None else f"{escape(self.path, 4096)}: {self.message}"


class AdapterRefused(IcmLoraError):
    """An adapter that icm does not take, because it could not give it back exactly.

    Attributes:
        kind: A short stable word for the reason, for tables and JSON ("dora", "bias", "non-finite", ...).
    """

    def __init__(self, message: str, *, kind: str, path: str | Path | None = None, hint: str | None = None) -> None:
        super().__init__(message, path=path, hint=hint)
        self.kind = kind


class UnsafeInput(AdapterRefused):
    """Input that is refused for safety: pickles, links out of the tree, special files, broken limits."""


class OutputExists(IcmLoraError):
    """The output folder is not empty, or the output file exists, and overwriting was not asked for."""


class FoldersUnusable(IcmLoraError):
    """The folders for served adapters have no room left, or cannot be trusted."""


class TaskChanged(IcmLoraError):
    """A task is another one than it was when somebody looked for it."""


class FoldersInUse(IcmLoraError):
    """Another server uses the folders for served adapters."""


class BaseModelNotFound(IcmLoraError):
    """No local copy of the base model was found; the network is never asked."""


class BaseModelMismatch(IcmLoraError):
    """The base model lacks a module of the adapter, or has it in another shape."""


class BaseModelUnsuited(IcmLoraError):
    """The base model is of a kind that icm cannot run; its tasks have no task vectors and are not measured."""


class DeviceUnavailable(IcmLoraError):
    """The device that was asked for does not exist on this machine."""


class OutOfMemory(IcmLoraError):
    """The memory of a card or of this machine ran out; the hint says what takes less."""


class GeneratorError(IcmLoraError):
    """A generator that cannot be made, read or used as asked."""


class NotCovered(GeneratorError):
    """An adapter with a module, layer or rank that the generator does not cover."""


class CodeError(IcmLoraError):
    """A code that is damaged or was made by another generator."""


class OtherFormat(IcmLoraError):
    """A file in a format that another version of icm reads, and this one does not; nothing is damaged."""

    @classmethod
    def of(cls, name: str, found: int, known: int) -> OtherFormat:
        """Return the error for a file of format `found`, where format `known` is read."""
        if found > known:
            return cls(f"the {name} was written by a newer icm", hint="use the icm version that wrote it")
        fact = f"the {name} was written by icm 0.x, which this version does not read"
        return cls(fact, hint="ingest the adapters again, or use the icm version that wrote it")


class BundleError(IcmLoraError):
    """A bundle that is damaged, cut short, or of a format that this icm does not know."""


class DataError(IcmLoraError):
    """Samples or evaluation text that cannot be parsed or used."""


class OptionsConflict(DataError):
    """Options that contradict each other; nothing was done."""

    kind = "usage_problem"


class NotRecognized(IcmLoraError):
    """The samples belong to none of the known tasks."""


class InvalidShard(IcmLoraError):
    """A shard that is not written as `1/8`."""


class InvalidWorkers(IcmLoraError):
    """Neither a number of workers nor an address, or one GPU for all of them."""


class WorkerDied(IcmLoraError):
    """The worker of a task died, on every attempt."""


class WorkersUnavailable(IcmLoraError):
    """Ray is not installed, or the cluster cannot be started or reached."""


class OtherProcessFailed(IcmLoraError):
    """Another process of the same training failed or was killed; the first one has saved a checkpoint."""


class Cancelled(IcmLoraError):
    """The caller asked to stop, and the work stopped between two atomic steps; what was finished is stored.

    Attributes:
        report: What was done until then, where the use case reports that.
    """

    def __init__(self, message: str = "stopped; completed work is kept") -> None:
        super().__init__(message)
        self.report: object = None


@contextmanager
def located(path: str | Path | None) -> Iterator[None]:
    """Add a path to the errors raised in the block, unless they have a more precise one.

    Parsers see only bytes; the caller who knows where the bytes came from wraps the call.
    """
    try:
        yield
    except IcmLoraError as error:
        if error.path is None and path is not None:
            error.path = str(path)
        raise
