"""The parts of an open store of any kind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from registry.storage.blobs.backend import BlobBackend, Leftover
    from registry.storage.database import Database
    from registry.storage.locks import StoreLock

T = TypeVar("T")


class Footprint(NamedTuple):
    """Bytes of a store other than blobs and manifests."""

    database: int
    unreferenced: int  # left by killed commands
    overhead: int


class StoreMaintenance(Protocol):
    """Maintenance of a kind of store around changes."""

    def run(self, change: Callable[[], T]) -> T:
        """Run a change; if the disk is full, free space and retry once."""
        ...

    def after_deletion(self) -> None:
        """Prepare for the next full disk if there is room."""
        ...

    def footprint(self, blobs: Collection[str], manifests: Collection[str]) -> Footprint:
        """Return the bytes of everything except these blobs and manifests and remote files."""
        ...

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield leftovers of killed commands, except blobs; with `aside`, files in quarantine."""
        ...


class StoreParts(NamedTuple):
    """The parts of an open store."""

    lock: StoreLock
    database: Database
    blobs: BlobBackend
    manifests: BlobBackend
    maintenance: StoreMaintenance
