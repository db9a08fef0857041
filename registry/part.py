"""What every part of a store works with: its folder, the lock, the database and the blobs."""

from __future__ import annotations

from collections.abc import Iterable

from registry.blobs.content import Blobs
from registry.database import Database
from registry.folder import StorePaths
from registry.locks import FileLock


class Part:
    """Operations on one kind of row; a :class:`registry.store.Store` has one of each."""

    def __init__(self, paths: StorePaths, lock: FileLock, database: Database, blobs: Blobs) -> None:
        self._paths, self._lock, self._db, self._blobs = paths, lock, database, blobs

    def _drop(self, digests: Iterable[str]) -> None:
        """Delete files that rows no longer name, after the commit, if no other process uses the store."""
        from registry.prune import drop_unreferenced  # readers delete nothing

        drop_unreferenced(self._lock, self._db, self._blobs, digests)
