"""The parts of an open store, for every kind of storage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from registry.storage.blobs.backend import BlobBackend, Leftover
    from registry.storage.database import Database
    from registry.storage.locks import StoreLock

T = TypeVar("T")


class Footprint(NamedTuple):
    """Bytes of a store besides its blobs and manifests."""

    database: int
    unreferenced: int  # what killed commands left
    overhead: int


class StoreMaintenance(Protocol):
    """What a kind of store does around changes."""

    def run(self, change: Callable[[], T]) -> T:
        """Run a change; if the disk is full, make room and run it once more."""
        ...

    def after_deletion(self) -> None:
        """Create the reserve for the next full disk, if there is room."""
        ...

    def footprint(self, blobs: Collection[str], manifests: Collection[str]) -> Footprint:
        """Return the bytes of everything but these blobs and manifests, and files at a remote place."""
        ...

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield the leftovers of killed commands other than blobs, or with `aside` the files in quarantine."""
        ...


class StoreParts(NamedTuple):
    """What an open store consists of."""

    lock: StoreLock
    database: Database
    blobs: BlobBackend
    manifests: BlobBackend
    maintenance: StoreMaintenance
