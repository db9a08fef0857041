"""Opening and closing a store, and its bytes. The operations on rows are built on this."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self, TypeVar

from registry import fs
from registry.blobs import BlobStore
from registry.engine import Database
from registry.errors import NotAStore, RegistryError, StoreNotFound, StoreReadOnly, StoreTooNew
from registry.intake import PutRefusal, PutResult, put_files
from registry.locks import StoreLock
from registry.migrations import migrate
from registry.paths import FORMAT_TEXT, StorePaths
from registry.reserve import make_reserve, with_reserve

T = TypeVar("T")


class StoreBase:
    """An open store: its folder, its lock, its blobs. Made by :meth:`open`."""

    def __init__(self, paths: StorePaths, lock: StoreLock, database: Database) -> None:
        self._paths = paths
        self._lock = lock
        self._db = database
        self._blobs = BlobStore(paths)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        create: bool = False,
        read_only: bool = False,
        lock_timeout: float = 30.0,
        command: str = "icm",
    ) -> Self:
        """Open a store and hold it, shared with others, until :meth:`close`.

        Args:
            path: the store folder.
            create: make it if there is none.
            read_only: refuse writes; works on read-only media.
            lock_timeout: seconds to wait for other processes, for the lock and for each commit.
            command: what this process does, for the message that others see.

        Raises:
            StoreNotFound: there is no store and `create` is False.
            NotAStore: the folder holds something else.
            StoreLocked: another process holds it exclusively.
            StoreTooNew: a newer icm wrote it.
            DamagedStore: the database is missing or broken.
        """
        paths = StorePaths(path)
        if create and not read_only:
            _prepare_folder(paths)
        elif not paths.format.exists():
            hint = "`icm ingest PATH` makes one; --store or ICM_STORE says where"
            raise StoreNotFound(f"there is no store at {path}", path=path, hint=hint)
        with fs.store_errors(paths.lock):
            lock = StoreLock(paths.lock, timeout=lock_timeout, command=command, writable=not read_only)
        try:
            lock.share()
            database = Database(paths.database, read_only=read_only, busy_timeout=lock_timeout)
            if not paths.format.exists():
                with lock.exclusive():
                    _create(paths, database)
            _check_format(paths)
            if not read_only:
                _make_folders(paths)
            with_reserve(paths, lambda: migrate(database))  # a newer icm is often asked to empty a full disk
        except BaseException:
            lock.close()
            raise
        return cls(paths, lock, database)

    def close(self) -> None:
        """Let go of the store."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def paths(self) -> StorePaths:
        """Where the parts of the store are."""
        return self._paths

    @property
    def schema_version(self) -> int:
        """The schema of the database, as a count of migrations."""
        with self._db.connection() as connection:
            return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())

    def put_blob(self, data: fs.Bytes) -> str:
        """Store bytes durably and return their digest; a row may then refer to it.

        Raises:
            StoreFull: no space left.
        """
        return self.put_blobs([data])[0]

    def put_blobs(self, items: Sequence[fs.Bytes]) -> list[str]:
        """Store byte strings durably, with one sync per folder for all, and return their digests in order.

        Raises:
            StoreFull: no space left.
        """
        self._must_write()
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
        self._must_write()
        return put_files(self._blobs, self._paths, files, inspect, refusals, contents, withheld)

    def read_blob(self, digest: str) -> bytes:
        """Return a blob's bytes once they are known to be the right ones.

        Raises:
            MissingBlob: there is no such file.
            DamagedBlob: its bytes have another digest.
        """
        return self._blobs.read(digest)

    def blob_size(self, digest: str) -> int:
        """Return a blob's length in bytes.

        Raises:
            MissingBlob: there is no such file.
        """
        return self._blobs.size(digest)

    def _must_write(self) -> None:
        if self._db.read_only:
            raise StoreReadOnly(f"the store {self._paths.root} was opened read-only", path=self._paths.root)


def _prepare_folder(paths: StorePaths) -> None:
    """Make the store folder, unless it holds things that are not a store's."""
    with fs.store_errors(paths.root):
        paths.root.mkdir(parents=True, exist_ok=True)
        check_place(paths.root)


def check_place(root: Path) -> None:
    """Check that a folder is a store, or that one could be made there.

    Raises:
        NotAStore: It holds things that are not a store's.
    """
    # FORMAT too: another process may make a store here while this looks.
    ours = {"FORMAT", "registry.db", "registry.db-journal", "blobs", "tmp", "quarantine", "lock", "reserve"}
    if not root.is_dir() or StorePaths(root).format.exists():
        return
    if foreign := {entry.name for entry in root.iterdir()} - ours:
        message = f"{root} is no store: it holds {min(foreign)!r}"
        raise NotAStore(message, path=root, hint="name an empty or a new folder with --store")


def _create(paths: StorePaths, database: Database) -> None:
    """Make the parts of a store, FORMAT last; a killed attempt is simply made again."""
    if paths.format.exists():  # another process was faster
        return
    with fs.store_errors(paths.root):
        _make_folders(paths)
        make_reserve(paths)
        migrate(database, create=True)
        fs.failpoint("store-before-format")
        temporary = paths.tmp / "FORMAT"
        fs.unlink(temporary)
        fs.write_file(temporary, FORMAT_TEXT.encode(), 0o444)
        fs.replace(temporary, paths.format)
        fs.fsync_dir(paths.root)
        fs.fsync_dir(paths.root.parent)


def _make_folders(paths: StorePaths) -> None:
    """Make the folders of a store; copies of one often lack the empty ones."""
    with fs.store_errors(paths.root):
        for folder in (paths.blobs, paths.tmp, paths.quarantine):
            fs.make_dir(folder)


def _check_format(paths: StorePaths) -> None:
    try:
        with paths.format.open("rb") as file:
            text = file.read(64)
    except OSError as error:
        raise RegistryError(f"cannot read {paths.format}: {error.strerror}", path=paths.format) from error
    if text != FORMAT_TEXT.encode():
        known = FORMAT_TEXT.strip()
        message = f"{paths.root} has the format {text.decode(errors='replace').strip()!r}, this icm knows {known!r}"
        raise StoreTooNew(message, path=paths.format, hint="use the icm that wrote it, or a newer one")
