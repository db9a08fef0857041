"""Blobs in a folder that machines share, for a store whose database is elsewhere.

    FOLDER/blobs/3/3f9a...    as in a store folder; manifests/ likewise
    FOLDER/owner              whose blobs these are; a folder without it is not mounted
    FOLDER/clock              touched to learn the time of the server

Locks live in the database, which may grant one to another process while a slow one is still deleting. So only files
written at least an hour ago are deleted, after another look, and writing bytes that exist makes their file new again.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from registry import files as fs
from registry.errors import NotAStore, StoreUnavailable
from registry.storage.blobs.backend import RECOVER, BlobInfo
from registry.storage.blobs.local import LocalBackend, LocalBatch
from registry.storage.paths import Namespace, StorePaths, make_folders

_MODE = 0o444


class SharedBackend(LocalBackend):
    """The blobs in a folder that belongs to one store.

    Args:
        folder: The folder, at the same path on every machine.
        owner: The number of the store whose blobs these are.
    """

    is_remote = True

    def __init__(self, folder: Path, owner: str, namespace: Namespace = "blobs") -> None:
        super().__init__(StorePaths(folder), namespace)
        self._folder, self._owner, self.home = folder, owner, str(folder)
        self._ahead: float | None = None  # the server's time less this machine's count of seconds

    def check_free(self) -> None:
        """Raise unless a new store can have its blobs here; this makes the folder.

        Raises:
            NotAStore: It is another store's, or holds other things.
        """
        with fs.store_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if (self._folder / "owner").exists():
                raise self._not_mine()
            self._refuse_foreign()

    def claim(self) -> None:
        """Make this the place of the store's blobs: two stores that shared it would prune each other's.

        Raises:
            NotAStore: It is another store's, or holds other things.
        """
        with fs.store_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / "owner").exists():
                self._refuse_foreign()
                make_folders(self._paths)
                # Write whose folder this is, unless another process has.
                temporary = self._paths.tmp / uuid4().hex
                fs.write_file(temporary, self._owner.encode(), _MODE)
                try:
                    fs.rename_new(temporary, self._folder / "owner")
                except FileExistsError:
                    fs.unlink(temporary)
                fs.fsync_dir(self._folder)
        self._check_owner()

    def now(self) -> float:
        """Return the time of the machine that has the disk, in seconds since 1970."""
        self._check_owner()
        if self._ahead is None:
            clock = self._folder / "clock"
            with fs.store_errors(clock):
                clock.touch()
                self._ahead = clock.stat().st_mtime - time.monotonic()
        return self._ahead + time.monotonic()

    @contextmanager
    def batch(self) -> Iterator[LocalBatch]:
        """Begin a batch; bytes that are there are made young."""
        self._check_owner()
        with super().batch() as batch:
            yield batch
            for digest in batch.known():
                with fs.store_errors(self.place(digest)):
                    os.utime(self.path(digest))

    def get(self, digest: str) -> BinaryIO:
        """Open the file of a blob."""
        with self._mounted():
            return super().get(digest)

    def exists(self, digest: str) -> bool:
        """Return whether the file exists."""
        if super().exists(digest):
            return True
        self._check_owner()
        return False

    def size(self, digest: str) -> int:
        """Return the length of the file."""
        with self._mounted():
            return super().size(digest)

    def all(self) -> Iterator[BlobInfo]:
        """Yield every file that is named by a digest."""
        self._check_owner()
        return super().all()

    def delete(self, digest: str, *, newest: float = math.inf) -> int:
        """Remove a file unless it has been written after `newest`."""
        self._check_owner()
        return super().delete(digest, newest=newest)

    @contextmanager
    def _mounted(self) -> Iterator[None]:
        """Raise `StoreUnavailable` where a file is missing because the whole folder is."""
        try:
            yield
        except FileNotFoundError:
            self._check_owner()
            raise

    def _refuse_foreign(self) -> None:
        # Another process may be claiming it too, and be done before this one has looked.
        ours = {"blobs", "manifests", "tmp", "quarantine", "owner", "clock"}
        if foreign := {entry.name for entry in self._folder.iterdir()} - ours:
            hint = "use an empty or new folder"
            raise NotAStore(f"{self._folder} holds {min(foreign)!r}", path=self._folder, hint=hint)

    def owner(self) -> str:
        """Return the number of the store whose folder this is."""
        try:
            return (self._folder / "owner").read_text(errors="replace")
        except OSError as error:
            hint = "check that it is mounted and readable; if `icm init` was interrupted, run it again"
            fact = f"no icm blobs in {self._folder}: {error.strerror}"
            raise StoreUnavailable(fact, path=self._folder, hint=hint) from None

    def _check_owner(self) -> None:
        """Raise unless the folder is there, and is the store's."""
        if self.owner() != self._owner:
            raise self._not_mine()

    def _not_mine(self) -> NotAStore:
        fact = f"{self._folder} holds the blobs of another store"
        return NotAStore(fact, path=self._folder, hint=f"choose another folder, or {RECOVER}")
