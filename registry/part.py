"""What every part of a store works with: the database, the files, the lock."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from registry import files as fs
from registry.blobs.local import BlobStore, PutRefusal, PutResult, put_files
from registry.database import Database
from registry.errors import StoreReadOnly
from registry.folder import StorePaths
from registry.locks import FileLock

T = TypeVar("T")


class Part:
    """Operations on one kind of row; a :class:`registry.store.Store` has one of each."""

    def __init__(self, paths: StorePaths, lock: FileLock, database: Database, blobs: BlobStore) -> None:
        self._paths, self._lock, self._db, self._blobs = paths, lock, database, blobs

    def must_write(self) -> None:
        """Raise unless the store was opened for writing."""
        if self._db.read_only:
            raise StoreReadOnly(f"the store {self._paths.root} was opened read-only", path=self._paths.root)


class Blobs(Part):
    """Immutable bytes, named by their SHA-256."""

    def put(self, data: fs.Bytes) -> str:
        """Store bytes durably and return their digest; a row may then refer to it.

        Raises:
            StoreFull: no space left.
        """
        return self.put_all([data])[0]

    def put_all(self, items: Sequence[fs.Bytes]) -> list[str]:
        """Store byte strings durably, with one sync per folder for all, and return their digests in order.

        Raises:
            StoreFull: no space left.
        """
        self.must_write()
        return self._blobs.put(items)

    def put_files(
        self,
        files: Sequence[Path],
        inspect: Callable[[Path, memoryview], T],
        refusals: tuple[type[Exception], ...] = (),
        contents: Sequence[bytes] = (),
        withheld: Mapping[Path, Collection[str]] = MappingProxyType({}),
    ) -> list[PutResult[T] | PutRefusal]:
        """Store files durably, several at a time.

        Give it a few hundred megabytes at once: nothing of a batch counts before all of it is synced.

        Args:
            files: plain files; no links are followed.
            inspect: called on worker threads with a path and the very bytes that are hashed and stored; raises to
                refuse them. The bytes are those of another file afterwards: what it returns must not refer to them.
            refusals: what `inspect` raises to refuse one file. Any other exception ends the batch.
            contents: bytes that are in memory already, to be stored in the same batch; :func:`registry.blobs.digest_of`
                tells their digests.
            withheld: file -> digests under which it is inspected but not stored: weights that are to stay evicted.

        Returns:
            For each file, in order: a result, or a refusal with the reason.

        Raises:
            StoreFull: no space left; nothing of the batch is stored.
        """
        self.must_write()
        return put_files(self._blobs, self._paths, files, inspect, refusals, contents, withheld)

    def read(self, digest: str) -> bytes:
        """Return a blob's bytes once they are known to be the right ones.

        Raises:
            MissingBlob: there is no such file.
            DamagedBlob: its bytes have another digest.
        """
        return self._blobs.read(digest)

    def size(self, digest: str) -> int:
        """Return a blob's length in bytes.

        Raises:
            MissingBlob: there is no such file.
        """
        return self._blobs.size(digest)
