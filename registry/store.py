"""The only door to a store.

with Store.open("loras.icm", create=True, command="icm ingest") as store:
    results = store.blobs.put_files(files, inspect)   # bytes first, durable
    store.tasks.ingest([TaskIngest(...)])             # rows last: the commit point
    data = store.blobs.read(store.tasks.final("shakespeare").weights)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from registry import files as fs
from registry.errors import NotAStore, RegistryError, StoreNotFound
from registry.names import Address, DatabaseUrl, address_of
from registry.storage.blobs.content import Blobs
from registry.storage.blobs.local import LocalBackend
from registry.storage.folder import (
    FolderUpkeep,
    StoreParts,
    StorePaths,
    check_format,
    create_store,
    make_folders,
    prepare_folder,
    with_reserve,
)
from registry.storage.locks import Patience
from registry.storage.locks.flocks import FolderLock
from registry.storage.sqlite import SqliteDatabase, migrate

if TYPE_CHECKING:
    from registry.errors import DamagedStore
    from registry.storage.blobs.backend import BlobBackend
    from registry.storage.blobs.cache import BlobCache
    from registry.storage.prune import PruneReport
    from registry.storage.row_repair import RowRepair
    from registry.tables.base_models import BaseModels
    from registry.tables.bundles import Bundles
    from registry.tables.codes import Codes
    from registry.tables.copies import Copies
    from registry.tables.evaluations import Evaluations
    from registry.tables.eviction import Originals
    from registry.tables.generators import Generators
    from registry.tables.runs import Runs
    from registry.tables.summaries import Summaries
    from registry.tables.tasks import Tasks
    from registry.tables.vectors import Vectors
    from registry.usage import Usage
    from registry.verify import Finding

    OnDamage = Callable[[str, DamagedStore], None]

__all__ = ["Store"]


class Store:
    """Rows and bytes of a fleet; see :meth:`open`.

    A store is used by one thread at a time, and is opened anew after a fork. Any number of processes may have it
    open; those that delete wait for the others.
    """

    def __init__(
        self, address: Address, parts: StoreParts, *, cache: BlobCache | None = None, on_damage: OnDamage | None = None
    ) -> None:
        self.address = address
        self._lock, self._db, backend, self._upkeep = parts
        self.blobs = Blobs(backend, self._db.must_write, cache)
        self._parts = self._upkeep, self._lock, self._db, self.blobs, on_damage

    @classmethod
    def open(
        cls,
        place: str | Path | DatabaseUrl,
        *,
        create: bool = False,
        read_only: bool = False,
        lock_timeout: float = 30.0,
        patience: Patience | None = None,
        command: str = "icm",
        backend: BlobBackend | None = None,
        blobs: str | None = None,
        cache: Callable[[], Path] | None = None,
        on_damage: OnDamage | None = None,
    ) -> Self:
        """Open a store and hold it, shared with others, until :meth:`close`.

        Args:
            place: the store folder, or the address of a database such as `postgresql://HOST/DATABASE`.
            create: make it if there is none; in a database only where `blobs` says where the bytes are to be.
            read_only: refuse writes; works on read-only media.
            lock_timeout: seconds to wait for other processes, in all.
            patience: what is left of these seconds, where the same command has other stores open.
            command: what this process does, for the message that others see.
            backend: where the bytes are, if not where the store says.
            blobs: where a new store has its bytes, such as `s3://BUCKET/PREFIX`, if not in its folder.
            cache: returns the folder in which copies of what is read from a remote place are kept.
            on_damage: called with the name of a task with wrong rows and what is wrong, where many tasks are read: the
                others are read without it. By default that is an error.

        Raises:
            StoreNotFound: There is none, and `create` is not set.
            StoreUnavailable: The database, or the place of the bytes, cannot be reached.
            NotAStore: There is something else, or a store that has its bytes elsewhere than `blobs`.
        """
        address, patience = address_of(place), patience or Patience(lock_timeout)
        blobs = blobs if create and not read_only else None
        if isinstance(address, DatabaseUrl):
            parts = _server_parts(address, read_only, patience, command, blobs)
        else:
            parts = _folder_parts(address, create, read_only, patience, command, blobs)
        parts = parts if backend is None else parts._replace(backend=backend)
        copies = _copies_in(cache) if parts.backend.is_remote and cache is not None else None
        return cls(address, parts, cache=copies, on_damage=on_damage)

    @cached_property
    def listing(self) -> Summaries:
        """What listings show of tasks; `tasks` has it too, but takes longer to import."""
        from registry.tables.summaries import Summaries

        return Summaries(*self._parts)

    # These take long to import, with SQLAlchemy, and not every command needs them.

    @cached_property
    def generators(self) -> Generators:
        """Generators and which of them is current."""
        from registry.tables.generators import Generators

        return Generators(*self._parts)

    @cached_property
    def codes(self) -> Codes:
        """Codes of tasks under generators."""
        from registry.tables.codes import Codes

        return Codes(*self._parts)

    @cached_property
    def vectors(self) -> Vectors:
        """Task vectors."""
        from registry.tables.vectors import Vectors

        return Vectors(*self._parts)

    @cached_property
    def evaluations(self) -> Evaluations:
        """Measurements."""
        from registry.tables.evaluations import Evaluations

        return Evaluations(*self._parts)

    @cached_property
    def runs(self) -> Runs:
        """Training runs."""
        from registry.tables.runs import Runs

        return Runs(*self._parts)

    @cached_property
    def tasks(self) -> Tasks:
        """Tasks with their adapters."""
        from registry.tables.tasks import Tasks

        return Tasks(*self._parts)

    @cached_property
    def base_models(self) -> BaseModels:
        """Base models."""
        from registry.tables.base_models import BaseModels

        return BaseModels(*self._parts)

    @cached_property
    def originals(self) -> Originals:
        """The weights as they were ingested."""
        from registry.tables.eviction import Originals

        return Originals(*self._parts)

    @cached_property
    def bundles(self) -> Bundles:
        """Codes that were made elsewhere."""
        from registry.tables.bundles import Bundles

        return Bundles(*self._parts)

    @cached_property
    def copies(self) -> Copies:
        """Rows that go from store to store."""
        from registry.tables.copies import Copies

        return Copies(*self._parts)

    def close(self) -> None:
        """Let go of the store."""
        self._lock.close()
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def job(self, base_model: str, *, shared: bool = False) -> Iterator[None]:
        """Hold the job lock of a base model.

        One process at a time trains, updates or evicts. Those that encode hold the lock `shared`: any number of them
        at the same time, but none while another process holds it alone. The store lock is given up while this waits,
        so nothing read before may be trusted inside the block.
        """
        self._db.must_write()
        with self._lock.job(base_model, shared=shared):
            yield

    def usage(self, listed: Mapping[str, int] | None = None, *, has_wrong_rows: bool = False) -> Usage:
        """Return the bytes on disk by what they are for; their total is what `du -b` says of the files.

        Whoever has listed the blobs gives digest -> bytes of all of them as `listed`.
        Where it `has_wrong_rows`, these are not believed: what they alone refer to counts as `unreferenced`.
        """
        from registry.usage import measure

        found = measure(
            self._db, self.blobs.sizes() if listed is None else listed, self._upkeep, has_wrong_rows=has_wrong_rows
        )
        aside = sum(file.size for file in self.blobs.leftovers(aside=True)) if self.blobs.is_remote else 0
        return replace(found, unreferenced=found.unreferenced + aside)

    def prune(
        self,
        *,
        grace: float | None = None,
        is_precious: Callable[[bytes], bool] = lambda start: False,
        empty_quarantine: bool = False,
        dry_run: bool = False,
    ) -> PruneReport:
        """Delete blobs that no row refers to, and leftovers of killed commands, if older than `grace` seconds.

        By default that is what the place of the blobs asks for: an hour, or a day if it is remote.
        Blobs that are precious, by their first bytes, go to quarantine, unless that is to be emptied as well.
        """
        from registry.storage.prune import prune

        do = partial(prune, self._db, self.blobs, self._upkeep, grace=grace, is_precious=is_precious)
        do = partial(do, empty_quarantine=empty_quarantine, dry_run=dry_run)
        if dry_run:
            return do()
        self._db.must_write()
        with self._lock.exclusive():
            report = self._upkeep.run(do)
            self._upkeep.after_deletion()
        return report

    def verify(self, *, read_data: bool = False, names: Sequence[str] = ()) -> Iterator[Finding]:
        """Yield what is wrong, as it is found; `read_data` also hashes every blob, `names` checks only these tasks."""
        from registry.verify import verify

        return verify(self._db, self.blobs, self._upkeep, read_data=read_data, names=names)

    def repair(self) -> list[tuple[Finding, str]]:
        """Move damaged blobs to quarantine and return each with its new place."""
        from registry.verify import repair

        self._db.must_write()
        with self._lock.exclusive():
            return repair(self._db, self.blobs, self._upkeep)

    def repair_rows(self) -> list[RowRepair]:
        """Correct rows of which one bit flipped, and return what became of each wrong row."""
        self._db.must_write()
        with self._lock.exclusive():
            return self._upkeep.repair_rows()


def _folder_parts(
    path: Path, create: bool, read_only: bool, patience: Patience, command: str, blobs: str | None
) -> StoreParts:
    paths = StorePaths(path)
    if create and not read_only:
        if blobs is not None and not paths.place.exists() and not paths.format.exists():
            _check_free(paths, blobs)
        prepare_folder(paths)
    elif not paths.format.exists():
        hint = "run `icm ingest PATH` to create one, or set another path with --store or ICM_STORE"
        raise StoreNotFound(f"there is no store at {path}", path=path, hint=hint)
    with fs.store_errors(paths.lock):
        lock = FolderLock(paths.lock, paths.job, patience=patience, command=command, writable=not read_only)
    try:
        lock.enter()
        database = SqliteDatabase(paths.database, read_only=read_only, patience=patience, users=lock.users_of)
        if not paths.format.exists():
            with lock.exclusive():
                # Several processes may come here; the first one makes the store, the others find it.
                create_store(paths, database, blobs)
        check_format(paths)
        if not read_only:
            make_folders(paths)
        with_reserve(paths, lambda: migrate(database))  # a newer icm is often asked to empty a full disk
        backend = _blobs_of(paths, blobs)
    except BaseException:
        lock.close()
        raise
    return StoreParts(lock, database, backend, FolderUpkeep(database, paths))


def _server_parts(url: DatabaseUrl, read_only: bool, patience: Patience, command: str, blobs: str | None) -> StoreParts:
    try:
        from registry.storage.server import open_server  # most stores are folders
    except ImportError as error:
        hint = "install the extra: pip install 'icm-lora[team]'"
        raise RegistryError(f"PostgreSQL support is not installed: {error}", hint=hint) from error
    return open_server(url, read_only=read_only, patience=patience, command=command, blobs=blobs)


def _check_free(paths: StorePaths, blobs: str) -> None:
    """Raise unless a new store can have its blobs at an address. Call it before anything is written."""
    from registry.storage.blobs.place import backend_at

    try:
        backend_at(blobs, "").check_free()
    except NotAStore:
        if not paths.place.exists():  # else another process is making this store
            raise


def _blobs_of(paths: StorePaths, asked: str | None) -> BlobBackend:
    if paths.place.exists() or asked is not None:
        from registry.storage.blobs.place import far_blobs

        return far_blobs(paths, asked)
    return LocalBackend(paths)


def _copies_in(folder: Callable[[], Path]) -> BlobCache:
    from registry.storage.blobs.cache import BlobCache  # most stores have their blobs at hand

    return BlobCache(folder)
