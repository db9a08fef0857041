"""What goes around the changes of a store that must not fail half-way: before rows are deleted, and on a full disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

from registry.storage.folder import StorePaths, files_in, restore_reserve, with_reserve

if TYPE_CHECKING:
    from registry.storage.blobs.backend import Leftover
    from registry.storage.sqlite import SqliteDatabase

T = TypeVar("T")


class Upkeep(Protocol):
    """What a kind of store does around changes."""

    def before_deletion(self) -> None:
        """Make sure that all rows are right, and can be brought back; raise `DamagedRow` if one is wrong."""
        ...

    def run(self, change: Callable[[], T]) -> T:
        """Run a change of rows; if the disk is full, make room and run it once more."""
        ...

    def after_deletion(self) -> None:
        """Get ready for the next full disk, as far as there is room by now."""
        ...

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield what killed commands left that are no blobs, or else, `aside`, what is in quarantine."""
        ...


class FolderUpkeep:
    """The upkeep of a store folder: a copy of the database, and a file whose bytes are freed on a full disk."""

    def __init__(self, database: SqliteDatabase, paths: StorePaths) -> None:
        self._database, self._paths = database, paths

    def before_deletion(self) -> None:
        """Check all rows, and keep a copy of them."""
        from registry.storage.kept import keep  # readers delete nothing

        keep(self._database, self._paths)

    def run(self, change: Callable[[], T]) -> T:
        """Run a change of rows; if the disk is full, delete the reserve and run it once more."""
        return with_reserve(self._paths, change)

    def after_deletion(self) -> None:
        """Make the reserve again if there is room for it."""
        restore_reserve(self._paths)

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield the files of the temporary folder, or of the quarantine folder."""
        return files_in(self._paths.quarantine if aside else self._paths.tmp)
