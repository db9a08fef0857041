"""A store folder: making it, and its maintenance."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from registry import files as fs
from registry.errors import DamagedStore, NotAStore, RegistryError, StoreFull, StoreTooNew
from registry.storage.blobs.place import claim_location
from registry.storage.database import too_old
from registry.storage.parts import Footprint
from registry.storage.paths import StorePaths, files_in, make_folders

if TYPE_CHECKING:
    from registry.storage.blobs.backend import Leftover
    from registry.storage.sqlite import SqliteDatabase

T = TypeVar("T")
FORMAT_TEXT = "icm manifests 1\n"
REMOTE_TEXT = "icm manifests 1 remote\n"  # its blobs are at the address in BLOBS
RESERVE_BYTES = 128 << 10
_FORMAT = re.compile(rb"icm manifests [1-9][0-9]{0,5}( remote)?\n")
_OLD_FORMAT = re.compile(rb"icm store [1-9][0-9]{0,5}\n")


class FolderMaintenance:
    """The maintenance of a store folder: a file whose bytes are freed on a full disk."""

    def __init__(self, paths: StorePaths) -> None:
        self._paths = paths

    def run(self, change: Callable[[], T]) -> T:
        """Run a change; if the disk is full, delete the reserve and run it once more."""
        try:
            return change()
        except StoreFull:
            with fs.store_errors(self._paths.reserve):
                fs.unlink(self._paths.reserve)
            return change()

    def after_deletion(self) -> None:
        """Make the reserve again if there is room for it."""
        with suppress(OSError):
            make_reserve(self._paths)

    def footprint(self, blobs: Collection[str], manifests: Collection[str]) -> Footprint:
        """Add up the files of the folder, but for these blobs and manifests."""
        sums = Counter[str]()
        for folder, _, names in os.walk(self._paths.root):
            place = Path(folder)
            listed: Collection[str] = ()
            if place.is_relative_to(self._paths.blobs):
                listed = blobs
            elif place.is_relative_to(self._paths.manifests):
                listed = manifests
            for name in names:
                if name not in listed:
                    with suppress(FileNotFoundError):  # another process has renamed or removed it since
                        sums[self._use_of(place / name)] += (place / name).lstat().st_size
        return Footprint(sums["database"], sums["unreferenced"], sums["overhead"])

    def _use_of(self, path: Path) -> str:
        # The journal has the name of the database and a suffix.
        if path.parent == self._paths.root and path.name.startswith(self._paths.database.name):
            return "database"
        return "overhead" if path.parent in (self._paths.root, self._paths.jobs) else "unreferenced"

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield the files of the temporary folder, or of the quarantine folder."""
        return files_in(self._paths.quarantine if aside else self._paths.tmp)


def make_reserve(paths: StorePaths) -> None:
    """Write the reserve file if it is not there."""
    if not paths.reserve.exists():
        temporary = paths.tmp / "reserve"
        fs.unlink(temporary)
        # Real bytes: a sparse file would free nothing.
        fs.write_file(temporary, bytes(RESERVE_BYTES), 0o600)
        fs.replace(temporary, paths.reserve)


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
    # FORMAT too: another process may create a store here at the same time.
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
    with fs.store_errors(paths.root):
        make_folders(paths)
        make_reserve(paths)
        if blobs is not None:
            claim_location(paths, blobs)
        database.create()
        fs.failpoint("store-before-format")
        # FORMAT last: a folder without it is an attempt that was killed, and is made again.
        temporary = paths.tmp / "FORMAT"
        fs.unlink(temporary)
        fs.write_file(temporary, (REMOTE_TEXT if paths.place.exists() else FORMAT_TEXT).encode(), 0o444)
        fs.replace(temporary, paths.format)
        fs.fsync_dir(paths.root)
        fs.fsync_dir(paths.root.parent)


def check_format(paths: StorePaths) -> None:
    """Raise `StoreTooOld`, `StoreTooNew` or `DamagedStore` unless FORMAT names this program's format."""
    try:
        with paths.format.open("rb") as file:
            text = file.read(64)
    except OSError as error:
        raise RegistryError(f"cannot read {paths.format}: {error.strerror}", path=paths.format) from error
    if text in (FORMAT_TEXT.encode(), REMOTE_TEXT.encode()):
        if (text == REMOTE_TEXT.encode()) != paths.place.exists():
            hint = f"restore the missing file; a store with a BLOBS file has the format {REMOTE_TEXT.strip()!r}"
            raise DamagedStore(f"FORMAT and BLOBS in {paths.root} do not match", path=paths.root, hint=hint)
        return
    known = FORMAT_TEXT.strip()
    if _OLD_FORMAT.fullmatch(text):
        raise too_old(paths.root)
    if not _FORMAT.fullmatch(text):
        hint = f"if this is an icm store, write the line `{known}` to this file, then run `icm verify --read-data`"
        raise DamagedStore(f"{paths.format} is damaged: it does not hold a line such as {known!r}", hint=hint)
    hint = "use the icm version that wrote it, or a newer one; if this version wrote it, FORMAT is damaged"
    message = f"{paths.root} has the format {text.decode().strip()!r}, this icm supports {known!r}"
    raise StoreTooNew(message, path=paths.format, hint=hint)
