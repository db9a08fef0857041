"""What a store needs from the place that holds its bytes. A new kind of place implements these two protocols.

    with backend.batch() as batch:        from any number of threads
        batch.put(digest, data)
    # here all of them are durable, and manifests may refer to them

A backend holds immutable byte strings, each under the SHA-256 of its bytes. It need not hash anything: `Blobs` in
content.py names and verifies the bytes. `LocalBackend` in local.py keeps them in a folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, Protocol

from registry.files import Bytes

RECOVER = "run `icm init STORE --blobs LOCATION --recover` if the database of that store was lost"


class BlobInfo(NamedTuple):
    """A blob as a listing shows it.

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
    """What a writer that was killed left, or a blob in quarantine.

    Attributes:
        place: Where it is.
        size: Its length in bytes.
        modified: When it was written, in seconds since 1970.
        remove: Deletes it; one that is gone already is no error.
        is_folder: Whether it is a folder, which no command of icm makes there.
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

        Bytes that are there already are compared, not trusted, so that putting them again heals a damaged blob.

        Returns:
            False if the backend, or an earlier call for this batch, had these bytes.

        Raises:
            StoreFull: no space left.
        """
        ...


class BlobBackend(Protocol):
    """A place for immutable bytes. Errors of the place are raised as errors of `registry.errors`.

    Attributes:
        is_remote: Whether each call waits for a network. Then many are made at a time, and nothing that was written
            within the `grace` is deleted: a lock may be lost on the way.
        home: Where all blobs are, for messages.
        grace: Default age in seconds below which `icm prune` keeps files.
    """

    is_remote: bool
    home: str
    grace: float

    def now(self) -> float:
        """Return the time by the clock that `BlobInfo.modified` is from."""
        ...

    def batch(self) -> AbstractContextManager[BlobBatch]:
        """Begin a batch. When the block ends, its bytes are durable, and manifests may refer to them.

        If the block raises, none may: a place keeps nothing, or else some blobs that `icm prune` finds.
        """
        ...

    def get(self, digest: str) -> BinaryIO:
        """Open the bytes of a blob for reading; raise `FileNotFoundError` if there is none."""
        ...

    def exists(self, digest: str) -> bool:
        """Return whether the blob exists."""
        ...

    def size(self, digest: str) -> int:
        """Return the length of a blob in bytes; raise `FileNotFoundError` if there is none."""
        ...

    def all(self) -> Iterator[BlobInfo]:
        """Yield every blob, by digest, or raise: what may be deleted follows from a listing that is complete.

        A blob that is deleted during the listing may be left out.
        """
        ...

    def delete(self, digest: str, *, newest: float = math.inf) -> int:
        """Delete a blob and return the bytes that this frees; leave one that was written after `newest`."""
        ...

    def sync_deletions(self, digests: Iterable[str]) -> None:
        """Return once these deletions are durable."""
        ...

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield the leftovers of killed writers, or with `aside` the files in quarantine."""
        ...

    def quarantine(self, digest: str) -> str:
        """Move a damaged blob where `get` and `all` do not see it, and return where it is now."""
        ...

    def place(self, digest: str) -> str:
        """Return where the bytes of a blob are or would be, for messages to people."""
        ...
