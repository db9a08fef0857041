"""A copy of the database from before the last deletion, and putting it back.

    sound? ──▶ registry.db.kept ──▶ rows and files are deleted        before the first deletion of each command

A copy of registry.db that somebody puts back by hand is destroyed by a journal that lies beside it: SQLite takes what
the journal says of the old file for true of the new one. So it is put back here: whatever was there goes to quarantine,
the journal first.
"""

from __future__ import annotations

import zlib
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from registry import files as fs
from registry.errors import DamagedStore, StoreFull, StoreIOError, StoreNotFound
from registry.storage.folder import StorePaths, make_folders
from registry.storage.locks import Patience
from registry.storage.locks.flocks import FileLock
from registry.storage.sqlite import SqliteDatabase, copy_of, migrate, sqlite_of

_MODE = 0o600


def keep(database: SqliteDatabase, paths: StorePaths) -> None:
    """Keep a copy of all rows before some are deleted, once for each store that is opened; raise if any is wrong."""
    database.must_be_sound()
    if database.is_kept:
        return
    with suppress(StoreFull), fs.store_errors(paths.kept):  # on a full disk the earlier copy stays
        with database.connection() as connection:
            content = copy_of(sqlite_of(connection))
        _replace(paths.kept, zlib.compress(content), paths)
    database.is_kept = True


def set_aside(database: SqliteDatabase, paths: StorePaths) -> None:
    """Put a copy of a damaged database into quarantine, before it is repaired."""
    with fs.store_errors(paths.quarantine):
        with database.connection() as connection:
            content = sqlite_of(connection).serialize()  # byte for byte, and zeros where it cannot be read
        _replace(_place_aside(paths), content, paths)


def _place_aside(paths: StorePaths) -> Path:
    return paths.quarantine / f"registry.db.{uuid4().hex[:8]}"


def restore_database(root: Path, *, lock_timeout: float, command: str) -> str:
    """Put the copy in place of the database of a store, and return from when it is, in RFC 3339.

    Raises:
        StoreNotFound: There is no store.
        StoreLocked: Others use it.
        DamagedStore: There is no copy, or it is damaged too; nothing was changed.
    """
    paths = StorePaths(root)
    if not paths.format.exists():
        raise StoreNotFound(f"there is no store at {root}", path=root, hint="set its path with --store or ICM_STORE")
    patience = Patience(lock_timeout)
    with fs.store_errors(paths.lock):
        lock = FileLock(paths.lock, patience=patience, command=command)
    try:
        lock.enter()  # the database itself is not opened: it may not be one any more
        with lock.exclusive():
            return _restore(paths, patience)
    finally:
        lock.close()


def _restore(paths: StorePaths, patience: Patience) -> str:
    try:
        with fs.store_errors(paths.kept):
            packed, changed = paths.kept.read_bytes(), paths.kept.stat().st_mtime
        content = zlib.decompress(packed)
    except (StoreIOError, zlib.error) as error:
        hint = "icm backs up the database before it deletes anything; a copy of the whole store folder is a full backup"
        raise DamagedStore(f"no backup of the database: {error}", path=paths.kept, hint=hint) from error
    temporary = paths.tmp / "registry.db"
    with fs.store_errors(paths.database):
        make_folders(paths)
        _replace(temporary, content, paths)
        copy = SqliteDatabase(temporary, read_only=False, patience=patience)
        migrate(copy)
        copy.must_be_sound()
        aside = _place_aside(paths)
        # The journal first: with it, SQLite would change the copy into something else.
        for old, suffix in ((paths.journal, "-journal"), (paths.database, "")):
            if old.exists():
                fs.replace(old, aside.with_name(aside.name + suffix))
        fs.replace(temporary, paths.database)
        for older in paths.tmp.glob(f"{temporary.name}.schema-*"):  # where the copy was of an earlier schema
            if not (there := paths.root / older.name).exists():
                fs.replace(older, there)
        for folder in (paths.quarantine, paths.root):
            fs.fsync_dir(folder)
        fs.discard(temporary.with_name("registry.db-journal"))
    return datetime.fromtimestamp(changed, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _replace(path: Path, content: bytes, paths: StorePaths) -> None:
    """Write a file durably in place of an earlier one."""
    temporary = paths.tmp / uuid4().hex
    try:
        fs.write_file(temporary, content, _MODE)
        fs.replace(temporary, path)
        fs.fsync_dir(path.parent)
    finally:
        fs.discard(temporary)
