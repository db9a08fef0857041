"""Errors of `icmlora`: one base class, every error a fact, the path it is about and what to do next.

IcmLoraError
|-- AdapterRefused          an adapter that cannot be represented exactly (kind: "dora", "bias", "shape", ...)
|   `-- UnsafeInput         input that is not even opened or not read on (kind: "pickle", "symlink", "limits", ...)
|-- OutputExists            the folder to write into holds something already
|-- BaseModelNotFound       no local copy of the base model that an adapter names
|-- BaseModelMismatch       a base model whose modules or shapes are not the adapter's
|-- DeviceUnavailable       a device that was asked for and is not there
|-- GeneratorError          a generator that cannot be made, read or used as asked
|   `-- NotCovered          an adapter with a module, layer or rank that the generator was not made for
|-- CodeError               a code that is damaged or belongs to another generator
|-- UnknownBaseline         a baseline that is not in the catalogue
|-- BundleError             a bundle that is damaged, cut short or of another format
|-- DataError               samples or held-out text that cannot be used
`-- Cancelled               somebody asked to stop; what was finished is kept
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.errors import IcmError
from registry.names import escape


class IcmLoraError(IcmError):
    """Base class of every error that this package raises on purpose; `str` gives the path and the message."""

    def __str__(self) -> str:
        return self.message if self.path is None else f"{escape(self.path, 4096)}: {self.message}"


class AdapterRefused(IcmLoraError):
    """An adapter that is not taken in, because it could not be given back exactly.

    Attributes:
        kind: A short stable word for the reason, for tables and JSON ("dora", "bias", "non-finite", ...).
    """

    def __init__(self, message: str, *, kind: str, path: str | Path | None = None, hint: str | None = None) -> None:
        super().__init__(message, path=path, hint=hint)
        self.kind = kind


class UnsafeInput(AdapterRefused):
    """Input that is refused for safety: pickles, links out of the tree, special files, broken limits."""


class OutputExists(IcmLoraError):
    """The output folder is not empty and overwriting was not asked for."""


class BaseModelNotFound(IcmLoraError):
    """No local copy of the base model was found; the network is never asked."""


class BaseModelMismatch(IcmLoraError):
    """The base model lacks a module of the adapter, or has it in another shape."""


class DeviceUnavailable(IcmLoraError):
    """The device that was asked for does not exist on this machine."""


class GeneratorError(IcmLoraError):
    """A generator that cannot be made, read or used as asked."""


class NotCovered(GeneratorError):
    """An adapter with a module, layer or rank that the generator was not made for."""


class CodeError(IcmLoraError):
    """A code that is damaged or was made by another generator."""


class BundleError(IcmLoraError):
    """A bundle that is damaged, cut short, or of a format that this icm does not know."""


class UnknownBaseline(IcmLoraError):
    """A name that no baseline has."""


class DataError(IcmLoraError):
    """Samples or evaluation text that cannot be parsed or used."""


class Cancelled(IcmLoraError):
    """Somebody asked to stop, and the work stopped between two atomic steps; what was finished is kept.

    Attributes:
        report: What was done until then, where the use case reports that.
    """

    def __init__(self, message: str = "stopped; what was finished is kept") -> None:
        super().__init__(message)
        self.report: object = None


@contextmanager
def located(path: str | Path | None) -> Iterator[None]:
    """Give the errors raised inside the path they are about, unless they carry a closer one.

    Parsers see bytes and state facts; whoever knows where the bytes came from wraps the call.
    """
    try:
        yield
    except IcmLoraError as error:
        if error.path is None and path is not None:
            error.path = str(path)
        raise
