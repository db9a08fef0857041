"""All errors that `icmlora` raises on purpose. Each has a message, the path concerned, and a hint.

registry.errors.IcmError     base class of everything that icm raises on purpose: message, path, hint
├── registry.errors.RegistryError    errors of the store, drawn in that file
└── IcmLoraError
    ├── AdapterRefused       icm could not reproduce the adapter exactly (kind: "dora", "bias", "shape", ...)
    │   └── UnsafeInput      input refused for safety (kind: "pickle", "symlink", "limits", ...)
    ├── OutputExists         the output folder or file exists already
    ├── BaseModelNotFound    no local copy of the base model that an adapter names
    ├── BaseModelMismatch    the base model lacks a module of the adapter, or has it in another shape
    ├── BaseModelUnsuited    icm cannot run this kind of base model, such as an encoder
    ├── DeviceUnavailable    the machine does not have the device
    ├── OutOfMemory          a GPU or the host ran out of memory
    ├── GeneratorError       a generator cannot be created, read or used as requested
    │   └── NotCovered       an adapter with a module, layer or rank that the generator does not cover
    ├── CodeError            a code is damaged or belongs to another generator
    ├── OtherFormat          a file format that only another version of icm reads
    ├── BundleError          a bundle is damaged, truncated or of another format
    ├── DataError            samples or held-out text cannot be used
    │   └── OptionsConflict  options contradict each other
    ├── NotRecognized        samples match none of the known tasks
    ├── InvalidShard         not a shard such as 1/8
    ├── InvalidWorkers       neither a number nor an address of workers
    ├── WorkerDied           the worker died on every attempt at a task
    ├── WorkersUnavailable   no workers can be started or reached
    ├── OtherProcessFailed   another process of the same training failed or was killed
    ├── FoldersUnusable      the folders for served adapters are full, or belong to another user
    ├── FoldersInUse         another server uses the folders for served adapters
    └── Cancelled            the caller asked to stop; completed work is stored
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.errors import IcmError
from registry.names import escape


class IcmLoraError(IcmError):
    """Base class of this package's errors; `str` returns the path and the message."""

    def __str__(self) -> str:
        return self.message if self.path is None else f"{escape(self.path, 4096)}: {self.message}"


class AdapterRefused(IcmLoraError):
    """icm refuses the adapter because it could not reproduce it exactly.

    Attributes:
        kind: A short stable word for the reason, for tables and JSON ("dora", "bias", "non-finite", ...).
    """

    def __init__(self, message: str, *, kind: str, path: str | Path | None = None, hint: str | None = None) -> None:
        super().__init__(message, path=path, hint=hint)
        self.kind = kind


class UnsafeInput(AdapterRefused):
    """Input refused for safety: pickles, links out of the tree, special files, exceeded limits."""


class OutputExists(IcmLoraError):
    """The output folder is not empty, or the output file exists, and overwriting was not requested."""


class FoldersUnusable(IcmLoraError):
    """The folders for served adapters have no room left, or cannot be trusted."""


class TaskChanged(IcmLoraError):
    """The task changed after it was looked up."""


class FoldersInUse(IcmLoraError):
    """Another server uses the folders for served adapters."""


class BaseModelNotFound(IcmLoraError):
    """No local copy of the base model was found; icm never downloads one."""


class BaseModelMismatch(IcmLoraError):
    """The base model lacks a module of the adapter, or has it in another shape."""


class BaseModelUnsuited(IcmLoraError):
    """icm cannot run this kind of base model; its tasks have no task vectors and are not evaluated."""


class DeviceUnavailable(IcmLoraError):
    """The requested device does not exist on this machine."""


class OutOfMemory(IcmLoraError):
    """A GPU or the host ran out of memory; the hint names a setting that needs less."""


class GeneratorError(IcmLoraError):
    """A generator cannot be created, read or used as requested."""


class NotCovered(GeneratorError):
    """An adapter with a module, layer or rank that the generator does not cover."""


class CodeError(IcmLoraError):
    """A code is damaged or was produced by another generator."""


class OtherFormat(IcmLoraError):
    """A file format that only another version of icm reads; the file is intact."""

    @classmethod
    def of(cls, name: str, found: int, known: int) -> OtherFormat:
        """Return the error for a file of format `found`, where this version reads format `known`."""
        if found > known:
            return cls(f"the {name} was written by a newer icm", hint="use the icm version that wrote it")
        fact = f"the {name} was written by icm 0.x, which this version does not read"
        return cls(fact, hint="ingest the adapters again, or use the icm version that wrote it")


class BundleError(IcmLoraError):
    """A bundle is damaged, truncated, or of a format that this icm does not know."""


class DataError(IcmLoraError):
    """Samples or evaluation text cannot be parsed or used."""


class OptionsConflict(DataError):
    """Options that contradict each other; nothing was done."""

    kind = "usage_problem"


class NotRecognized(IcmLoraError):
    """The samples match none of the known tasks."""


class InvalidShard(IcmLoraError):
    """The shard is not of the form `1/8`."""


class InvalidWorkers(IcmLoraError):
    """Not a number of workers or an address, or all workers would share one GPU."""


class WorkerDied(IcmLoraError):
    """The worker of a task died on every attempt."""


class WorkersUnavailable(IcmLoraError):
    """Ray is not installed, or the cluster cannot be started or reached."""


class OtherProcessFailed(IcmLoraError):
    """Another process of the same training failed or was killed; the first process has saved a checkpoint."""


class Cancelled(IcmLoraError):
    """The caller asked to stop, and work stopped between two atomic steps; completed work is stored.

    Attributes:
        report: The completed work, where the use case reports it.
    """

    def __init__(self, message: str = "stopped; completed work is kept") -> None:
        super().__init__(message)
        self.report: object = None


@contextmanager
def located(path: str | Path | None) -> Iterator[None]:
    """Add a path to errors raised in the block that have none.

    Parsers see only bytes; the caller that knows their file wraps the call.
    """
    try:
        yield
    except IcmLoraError as error:
        if error.path is None and path is not None:
            error.path = str(path)
        raise
