"""The protocols of blob storage. A new kind of storage implements both.

    with backend.batch() as batch:        from any number of threads
        batch.put(digest, data)
    # here all of them are durable, and manifests may refer to them

A backend holds immutable byte strings, each under the SHA-256 of its bytes. It need not hash anything: `Blobs` in
content.py names and verifies the bytes. `LocalBackend` in local.py keeps them in a folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, Protocol

from registry.files import Bytes

RECOVER = "run `icm init STORE --blobs LOCATION --recover` if the database of that store was lost"


class BlobInfo(NamedTuple):
    """A blob in a listing.

    Attributes:
        digest: Its name, 64 lower-case hexadecimal digits.
        size: Its length in bytes.
        modified: When it was written, in seconds since 1970.
    """

    digest: str
    size: int
    modified: float


@dataclass(frozen=True)
class Leftover:
    """A file left by a killed writer, or a blob in quarantine.

    Attributes:
        place: Its location.
        size: Its length in bytes.
        modified: When it was written, in seconds since 1970.
        remove: Deletes it if it still exists.
        is_folder: Whether it is a folder; icm creates none there.
    """

    place: str
    size: int
    modified: float
    remove: Callable[[], None] = field(repr=False, compare=False)
    is_folder: bool = False


class BlobBatch(Protocol):
    """Bytes that become durable together."""

    def put(self, digest: str, data: Bytes) -> bool:
        """Write bytes under their digest; several threads may call this at once.

        Existing bytes are compared, not trusted, so that putting them again repairs a damaged blob.

        Returns:
            False if the backend, or an earlier call for this batch, had these bytes.

        Raises:
            StoreFull: no space left.
        """
        ...


class BlobBackend(Protocol):
    """Storage of immutable bytes. Its errors are raised as errors of `registry.errors`.

    Attributes:
        is_remote: Whether each call waits for a network. Then calls run in parallel, and nothing written within the
            `grace` is deleted: a lock may be lost during a call.
        home: The location of all blobs, for messages.
        grace: Default minimum age, in seconds, of files that `icm prune` deletes.
    """

    is_remote: bool
    home: str
    grace: float

    def now(self) -> float:
        """Return the time by the clock of `BlobInfo.modified`."""
        ...

    def batch(self) -> AbstractContextManager[BlobBatch]:
        """Begin a batch. When the block ends, its bytes are durable, and manifests may refer to them.

        If the block raises, they must not: the storage keeps nothing, or some blobs that `icm prune` finds.
        """
        ...

    def get(self, digest: str) -> BinaryIO:
        """Open the bytes of a blob for reading; raise `FileNotFoundError` if there is none."""
        ...

    def exists(self, digest: str) -> bool:
        """Return whether there is a blob of that name."""
        ...

    def size(self, digest: str) -> int:
        """Return the length of a blob in bytes; raise `FileNotFoundError` if there is none."""
        ...

    def all(self) -> Iterator[BlobInfo]:
        """Yield every blob, by digest, or raise: deletion relies on complete listings.

        A blob that is deleted during the listing may be missing.
        """
        ...

    def delete(self, digest: str, *, newest: float = math.inf) -> int:
        """Delete a blob, unless written after `newest`; return the bytes freed."""
        ...

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield leftovers of killed writers, or with `aside`, the blobs in quarantine."""
        ...

    def quarantine(self, digest: str) -> str:
        """Move a damaged blob where `get` and `all` do not see it; return its new location."""
        ...

    def place(self, digest: str) -> str:
        """Return the location of a blob, existing or not, for messages."""
        ...
