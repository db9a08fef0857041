"""What all kinds of rows have in common: a transaction to write them in, and how their bytes go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from registry.files import failpoint
from registry.storage.database import Database

if TYPE_CHECKING:
    from registry.storage.blobs.content import Blobs
    from registry.storage.folder import StorePaths
    from registry.storage.locks import FileLock
    from registry.storage.row_writer import RowWriter


class Table:
    """Operations on one kind of row; a `registry.store.Store` has one of each."""

    def __init__(self, paths: StorePaths, lock: FileLock, database: Database, blobs: Blobs) -> None:
        self._paths, self._lock, self._db, self._blobs = paths, lock, database, blobs

    @contextmanager
    def _write(self) -> Iterator[RowWriter]:
        """Open a transaction for rows that refer to durable bytes; leaving the block commits."""
        from registry.storage.row_writer import RowWriter  # readers write nothing

        with self._db.write() as session:
            yield RowWriter(session, self._blobs)
            failpoint("rows-before-commit")
        failpoint("rows-committed")

    def _drop(self, digests: Iterable[str]) -> None:
        """Delete files that rows no longer name, after the commit, if no other process uses the store."""
        from registry.storage.prune import drop_unreferenced  # readers delete nothing

        drop_unreferenced(self._lock, self._db, self._blobs, digests)
