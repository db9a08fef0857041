"""Where things are in a store folder.

FORMAT            "icm store 2", or 3 with BLOBS; written last when a store is made, so it marks a whole one
BLOBS             where the bytes are, if not in blobs/: see blobs/place.py
registry.db       rows
registry.db.kept  a copy of them, deflated, from before the last deletion: see `registry.storage.kept`
registry.db.schema-8  the rows as an icm that has another format of codes left them, for that one to read
blobs/3/3f9a..    the bytes (see blobs/local.py); 16 folders: syncing 256 costs a first ingest a tenth of its time
tmp/              files being written; on the same file system, so that a rename is atomic
quarantine/       damaged blobs that were moved aside
lock, lock.gate   flocks of the store: see `registry.storage.locks`
jobs/             flocks of long jobs, one for each base model
reserve           bytes that are freed on a full disk, so that SQLite has room for its journal when it deletes rows
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from registry import files as fs
from registry.errors import DamagedStore, NotAStore, RegistryError, StoreFull, StoreTooNew

if TYPE_CHECKING:
    from registry.storage.blobs.backend import BlobBackend, Leftover
    from registry.storage.database import Database
    from registry.storage.locks import StoreLock
    from registry.storage.row_repair import RowRepair
    from registry.storage.sqlite import SqliteDatabase

FORMAT_TEXT = "icm store 2\n"
FAR_TEXT = "icm store 3\n"  # one whose blobs are elsewhere: an icm that does not know of that must not look for them

_FORMAT = re.compile(rb"icm store [1-9][0-9]{0,5}\n")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class StorePaths:
    """The paths of one store; what is there is said above."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.format = root / "FORMAT"
        self.place = root / "BLOBS"
        self.database = root / "registry.db"
        self.journal = root / "registry.db-journal"  # SQLite's own, of a commit that did not end
        self.kept = root / "registry.db.kept"
        self.blobs = root / "blobs"
        self.tmp = root / "tmp"
        self.quarantine = root / "quarantine"
        self.lock = root / "lock"
        self.jobs = root / "jobs"
        self.reserve = root / "reserve"

    def job(self, base_model: str) -> Path:
        """Return the lock file of a base model's jobs."""
        return self.jobs / hashlib.sha256(base_model.encode()).hexdigest()[:16]

    def blob(self, digest: str) -> Path:
        """Return the path of a blob. Only here does a digest become a path; raise `ValueError` if it is none."""
        if not is_digest(digest):
            raise ValueError(f"not a digest: {digest[:80]!r}")
        return Path(f"{self.root}/blobs/{digest[0]}/{digest}")  # three times faster than joining, for each of many


def is_digest(text: str) -> bool:
    """Say whether `text` is a SHA-256 in the form the store uses."""
    return _DIGEST.fullmatch(text) is not None


def files_in(folder: Path) -> Iterator[Leftover]:
    """Yield the files and folders in a folder that should be empty."""
    from registry.storage.blobs.backend import Leftover

    for path in sorted(folder.iterdir()):
        with suppress(FileNotFoundError):  # another process renamed or removed it
            status = path.stat()
            yield Leftover(
                str(path), status.st_size, status.st_mtime, partial(_remove, path), stat.S_ISDIR(status.st_mode)
            )


def _remove(path: Path) -> None:
    with fs.store_errors(path):
        fs.unlink(path)


RESERVE_BYTES = 128 << 10

T = TypeVar("T")


def make_reserve(paths: StorePaths) -> None:
    """Write the reserve file if it is not there."""
    if not paths.reserve.exists():
        temporary = paths.tmp / "reserve"
        fs.unlink(temporary)
        # Real bytes: a sparse file would free nothing.
        fs.write_file(temporary, bytes(RESERVE_BYTES), 0o600)
        fs.replace(temporary, paths.reserve)


def with_reserve(paths: StorePaths, delete: Callable[[], T]) -> T:
    """Run a deletion of rows; if the disk is full, delete the reserve and run it once more."""
    try:
        return delete()
    except StoreFull:
        with fs.store_errors(paths.reserve):
            fs.unlink(paths.reserve)
        return delete()


def restore_reserve(paths: StorePaths) -> None:
    """Make the reserve again if there is room for it by now."""
    with suppress(OSError):
        make_reserve(paths)


def prepare_folder(paths: StorePaths) -> None:
    """Make the store folder, unless it holds things that are not a store's."""
    with fs.store_errors(paths.root):
        paths.root.mkdir(parents=True, exist_ok=True)
        check_place(paths.root)


def check_place(root: Path) -> None:
    """Raise `NotAStore` if a folder holds things that are not a store's."""
    paths = StorePaths(root)
    if not root.is_dir() or paths.format.exists():
        return
    # FORMAT too: another process may make a store here while this looks.
    ours = {path.name for path in vars(paths).values() if path != root} | {"lock.gate"}
    if foreign := {entry.name for entry in root.iterdir()} - ours:
        message = f"{root} is not a store: it holds {min(foreign)!r}"
        raise NotAStore(message, path=root, hint="use --store with an empty or new folder")


def create_store(paths: StorePaths, database: SqliteDatabase, blobs: str | None = None) -> None:
    """Make the parts of a store, FORMAT last; a killed attempt is simply made again.

    Its blobs are at the address `blobs`, if not in the folder.
    """
    if paths.format.exists():  # another process was faster
        return
    from registry.storage.sqlite import migrate

    with fs.store_errors(paths.root):
        make_folders(paths)
        make_reserve(paths)
        if blobs is not None:
            from registry.storage.blobs.place import settle

            settle(paths, blobs)
        migrate(database, create=True)
        fs.failpoint("store-before-format")
        # FORMAT last: a folder without it is an attempt that was killed, and is made again.
        temporary = paths.tmp / "FORMAT"
        fs.unlink(temporary)
        fs.write_file(temporary, (FORMAT_TEXT if blobs is None else FAR_TEXT).encode(), 0o444)
        fs.replace(temporary, paths.format)
        fs.fsync_dir(paths.root)
        fs.fsync_dir(paths.root.parent)


def make_folders(paths: StorePaths) -> None:
    """Make the folders of a store; copies of one often lack the empty ones."""
    with fs.store_errors(paths.root):
        for folder in (paths.blobs, paths.tmp, paths.quarantine):
            fs.make_dir(folder)


def check_format(paths: StorePaths) -> None:
    """Raise `StoreTooNew` unless FORMAT names the format of this program; `DamagedStore` if it names none."""
    try:
        with paths.format.open("rb") as file:
            text = file.read(64)
    except OSError as error:
        raise RegistryError(f"cannot read {paths.format}: {error.strerror}", path=paths.format) from error
    if text in (FORMAT_TEXT.encode(), FAR_TEXT.encode()):
        if (text == FAR_TEXT.encode()) != paths.place.exists():
            hint = f"restore the missing file; a store with a BLOBS file has the format {FAR_TEXT.strip()!r}"
            raise DamagedStore(f"FORMAT and BLOBS in {paths.root} do not match", path=paths.root, hint=hint)
        return
    known = FORMAT_TEXT.strip()
    if not _FORMAT.fullmatch(text):
        hint = f"if this is an icm store, write the line `{known}` to this file, then run `icm verify --read-data`"
        raise DamagedStore(f"{paths.format} is damaged: it does not hold a line such as {known!r}", hint=hint)
    hint = "use the icm version that wrote it, or a newer one; if this version wrote it, FORMAT is damaged"
    message = f"{paths.root} has the format {text.decode().strip()!r}, this icm supports {known!r}"
    raise StoreTooNew(message, path=paths.format, hint=hint)


class StoreParts(NamedTuple):
    """What an open store consists of."""

    lock: StoreLock
    database: Database
    backend: BlobBackend
    upkeep: Upkeep


class Footprint(NamedTuple):
    """Bytes of a store besides its blobs."""

    database: int
    unreferenced: int  # what killed commands left
    overhead: int


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

    def footprint(self, listed: Collection[str]) -> Footprint:
        """Return the bytes of all that is neither one of the blobs `listed` nor at their remote place."""
        ...

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield what killed commands left that are no blobs, or else, `aside`, what is in quarantine."""
        ...

    def repair_rows(self) -> list[RowRepair]:
        """Correct rows of which one bit flipped, and return what became of each wrong row."""
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

    def footprint(self, listed: Collection[str]) -> Footprint:
        """Add up the files of the folder, but for the blobs `listed`."""
        sums = Counter[str]()
        for folder, _, names in os.walk(self._paths.root):
            is_of_blobs = Path(folder).is_relative_to(self._paths.blobs)
            for name in names:
                if not (is_of_blobs and name in listed):
                    path = Path(folder, name)
                    with suppress(FileNotFoundError):  # another process has renamed or removed it since
                        sums[self._use_of(path)] += path.lstat().st_size
        return Footprint(sums["database"], sums["unreferenced"], sums["overhead"])

    def _use_of(self, path: Path) -> str:
        """Return what a file that is no blob is for."""
        if path.name.startswith(self._paths.database.name):  # the journal has the name of the database and a suffix
            return "database"
        return "overhead" if path.parent in (self._paths.root, self._paths.jobs) else "unreferenced"

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield the files of the temporary folder, or of the quarantine folder."""
        return files_in(self._paths.quarantine if aside else self._paths.tmp)

    def repair_rows(self) -> list[RowRepair]:
        """Correct rows of which one bit flipped; a copy of the database goes to quarantine before."""
        from registry.storage.row_repair import repair_rows

        return repair_rows(self._database, self._paths)
