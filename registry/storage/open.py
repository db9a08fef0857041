"""Open the parts of a store: a folder, or a database on a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from registry import files as fs
from registry.errors import NotAStore, RegistryError, StoreNotFound
from registry.names import Address, DatabaseUrl
from registry.storage.blobs.local import LocalBackend
from registry.storage.blobs.place import backends_at, remote_blobs
from registry.storage.folder import FolderMaintenance, check_format, create_store, prepare_folder
from registry.storage.locks.flocks import FolderLock
from registry.storage.parts import StoreParts as StoreParts
from registry.storage.paths import StorePaths, make_folders
from registry.storage.sqlite import SqliteDatabase, check_links

if TYPE_CHECKING:
    from registry.storage.blobs.backend import BlobBackend
    from registry.storage.locks import Deadline


def open_parts(
    address: Address, *, create: bool, read_only: bool, deadline: Deadline, command: str, blobs: str | None
) -> StoreParts:
    """Open a store; `Store.open` explains the arguments and the errors."""
    blobs = blobs if create and not read_only else None
    if isinstance(address, DatabaseUrl):
        try:
            from registry.storage.server import open_server  # most stores are folders
        except ImportError as error:
            hint = "install the extra: pip install 'icm-lora[team]'"
            raise RegistryError(f"PostgreSQL support is not installed: {error}", hint=hint) from error
        return open_server(address, read_only=read_only, deadline=deadline, command=command, blobs=blobs)
    return open_folder(
        address, create=create and not read_only, read_only=read_only, deadline=deadline, command=command, blobs=blobs
    )


def open_folder(
    path: Path, *, create: bool, read_only: bool, deadline: Deadline, command: str, blobs: str | None
) -> StoreParts:
    """Open a store folder. Its database may be missing: the first read says so."""
    paths = StorePaths(path)
    if paths.format.exists():
        check_format(paths)  # before anything of a store of another version is touched
    if create:
        if blobs is not None and not paths.place.exists() and not paths.format.exists():
            _check_free(paths, blobs)
        prepare_folder(paths)
    elif not paths.format.exists():
        hint = "run `icm ingest PATH` to create one, or set another path with --store or ICM_STORE"
        raise StoreNotFound(f"there is no store at {path}", path=path, hint=hint)
    check_links(paths.database)
    with fs.store_errors(paths.lock):
        lock = FolderLock(paths.lock, paths.job, deadline=deadline, command=command, writable=not read_only)
    try:
        lock.enter()
        database = SqliteDatabase(paths.database, read_only=read_only, deadline=deadline, users=lock.users_of)
        if not paths.format.exists():
            with lock.exclusive():
                # Several processes may come here; the first one makes the store, the others find it.
                create_store(paths, database, blobs)
        check_format(paths)
        if not read_only:
            make_folders(paths)
        backends = _backends(paths, blobs)
    except BaseException:
        lock.close()
        raise
    return StoreParts(lock, database, *backends, FolderMaintenance(paths))


def _check_free(paths: StorePaths, blobs: str) -> None:
    """Raise unless a new store can have its blobs at an address. Call it before anything is written."""
    try:
        backends_at(blobs, "")[0].check_free()
    except NotAStore:
        if not paths.place.exists():  # else another process is making this store
            raise


def _backends(paths: StorePaths, asked: str | None) -> tuple[BlobBackend, BlobBackend]:
    if paths.place.exists() or asked is not None:
        return remote_blobs(paths, asked)
    return LocalBackend(paths, "blobs"), LocalBackend(paths, "manifests")
