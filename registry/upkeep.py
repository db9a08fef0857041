"""Operations on the store as a whole: the bill, garbage, damage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from registry import garbage, integrity, usage
from registry.base import StoreBase
from registry.reserve import restore_reserve, with_reserve

GRACE_SECONDS = 3600.0


class UpkeepOperations(StoreBase):
    """What the store can say of itself, and do for itself."""

    def usage(self) -> usage.Usage:
        """Return the bytes on disk by what they are for; their total is what `du -b` says of the files."""
        return usage.measure(self._db, self._paths)

    def prune(self, *, grace: float = GRACE_SECONDS, dry_run: bool = False) -> garbage.PruneReport:
        """Delete blobs that no row refers to, and leftovers of killed commands. Works on a full disk.

        Args:
            grace: seconds; younger files stay.
            dry_run: only say what would go.

        Raises:
            StoreLocked: other processes use the store.
        """
        if dry_run:
            return garbage.prune(self._db, self._blobs, self._paths, grace=grace, dry_run=True)
        self._must_write()
        with self._lock.exclusive():
            report = with_reserve(self._paths, lambda: garbage.prune(self._db, self._blobs, self._paths, grace=grace))
            restore_reserve(self._paths)
        return report

    def verify(self, *, read_data: bool = False, names: Sequence[str] = ()) -> Iterator[integrity.Finding]:
        """Yield what is wrong, as it is found.

        Args:
            read_data: also hash every blob.
            names: only the blobs of these tasks.

        Raises:
            TaskNotFound: a name is not in the store.
        """
        return integrity.verify(self._db, self._blobs, self._paths, read_data=read_data, names=names)

    def repair(self) -> list[tuple[integrity.Finding, Path]]:
        """Move damaged blobs to quarantine and return each with its new place.

        Raises:
            StoreLocked: other processes use the store.
        """
        self._must_write()
        with self._lock.exclusive():
            return integrity.repair(self._db, self._blobs, self._paths)
