"""Blobs, or manifests, in a local folder, one file for each.

    bytes ──▶ tmp/XXXX ──fsync──▶ rename ──▶ blobs/3/3f9a... ──fsync of the folder──▶ durable
              as they come                   once for a whole batch

A crash at any point leaves at most a file in tmp/ or one that no ref reaches; prune removes both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO
from uuid import uuid4

from registry import files as fs
from registry.manifests import is_digest
from registry.storage.blobs.backend import BlobInfo
from registry.storage.paths import Namespace, StorePaths, files_in

if TYPE_CHECKING:
    from registry.storage.blobs.backend import Leftover

_CHUNK = 1 << 20
_MODE = 0o444  # immutable, and it shows
_SYNCERS = 12  # a sync waits for the device, which does many at once as fast as one


class LocalBackend:
    """The blobs, or the manifests, of a store folder."""

    is_remote = False
    grace = 3600.0

    def __init__(self, paths: StorePaths, namespace: Namespace = "blobs") -> None:
        self._paths, self._namespace = paths, namespace
        self._folder_of_files = paths.root / namespace
        self.home = str(self._folder_of_files)

    def path(self, digest: str) -> Path:
        """Return the path of a file."""
        return Path(self.place(digest))

    def now(self) -> float:
        """Return the time of this machine, in seconds since 1970."""
        return time.time()

    @contextmanager
    def batch(self) -> Iterator[LocalBatch]:
        """Begin a batch; see `BlobBackend.batch`."""
        batch = LocalBatch(self._paths, self.path, self._folder_of_files)
        with fs.store_errors(self._folder_of_files):
            try:
                yield batch
            except BaseException:
                batch.discard()
                raise
            batch.publish()

    def get(self, digest: str) -> BinaryIO:
        """Open the file of a blob."""
        return fs.open_own(self.place(digest))

    def exists(self, digest: str) -> bool:
        """Return whether the file exists."""
        return self.path(digest).exists()

    def size(self, digest: str) -> int:
        """Return the length of the file."""
        return self.path(digest).stat().st_size

    def all(self) -> Iterator[BlobInfo]:
        """Yield every file that is named by a digest and is in the folder of its first digit."""
        for folder in sorted(self._folder_of_files.iterdir()) if self._folder_of_files.is_dir() else ():
            if folder.is_dir():
                first = folder.name
                yield from [
                    BlobInfo(name, status.st_size, status.st_mtime)
                    for name, status in fs.listed(folder)
                    if name[0] == first and is_digest(name)
                ]

    def delete(self, digest: str, *, newest: float = math.inf) -> int:
        """Remove a file."""
        path = self.path(digest)
        with fs.store_errors(path):
            try:
                status = path.stat()
            except FileNotFoundError:
                return 0
            if status.st_mtime > newest:
                return 0
            fs.unlink(path)
            fs.failpoint("blob-unlinked")
        return status.st_size

    def sync_deletions(self, digests: Iterable[str]) -> None:
        """Sync the folders of the deleted files."""
        for folder in {self.path(digest).parent for digest in digests}:
            with fs.store_errors(folder), suppress(FileNotFoundError):
                fs.fsync_dir(folder)

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield the files of the temporary folder, or of the quarantine folder."""
        return files_in(self._paths.quarantine if aside else self._paths.tmp)

    def quarantine(self, digest: str) -> str:
        """Move a file to the quarantine folder."""
        source = self.path(digest)
        target = self._paths.quarantine / f"{digest}.{uuid4().hex[:8]}"
        with fs.store_errors(source):
            fs.replace(source, target)
            fs.fsync_dir(self._paths.quarantine)
            fs.fsync_dir(source.parent)
        return str(target)

    def place(self, digest: str) -> str:
        """Return the path of the file."""
        return self._paths.file(self._namespace, digest)


class LocalBatch:
    """Files that get their names together, so that a batch of any size syncs each folder once."""

    def __init__(self, paths: StorePaths, path: Callable[[str], Path], folder: Path) -> None:
        self._paths, self.path, self._folder = paths, path, folder
        self._lock = Lock()
        self._written: dict[str, Path | None] = {}  # digest -> temporary file; None where the blob was there

    def put(self, digest: str, data: fs.Bytes) -> bool:
        """Write and sync a temporary file, unless exactly these bytes are there."""
        # Claim the digest first, so that two threads do not write the same bytes.
        with self._lock:
            if digest in self._written:
                return False
            self._written[digest] = None
        if _holds(self.path(digest), data):
            return False
        temporary = self._paths.tmp / uuid4().hex
        fs.write_file(temporary, data, _MODE)
        self._written[digest] = temporary
        fs.failpoint("blob-staged")
        return True

    def known(self) -> list[str]:
        """Return the digests of the bytes that were there."""
        return [digest for digest, temporary in self._written.items() if temporary is None]

    def publish(self) -> None:
        """Rename the files to their final names and make the names durable."""
        # Also of blobs that were there: the process that wrote one may have been killed before it synced the folder.
        folders = {self.path(digest).parent for digest in self._written}
        for folder in sorted(folders):
            fs.make_dir(folder)
        for digest, temporary in self._written.items():
            if temporary is not None:
                fs.replace(temporary, self.path(digest))
                fs.failpoint("blob-renamed")
        with ThreadPoolExecutor(_SYNCERS) as pool:
            list(pool.map(fs.fsync_dir, [self._folder, *sorted(folders)] if folders else []))
        fs.failpoint("blobs-durable")

    def discard(self) -> None:
        """Remove the temporary files."""
        for temporary in self._written.values():
            if temporary is not None:
                fs.discard(temporary)


def _holds(path: Path, data: fs.Bytes) -> bool:
    """Return whether a file has exactly these bytes."""
    try:
        with fs.open_own(path) as file:
            if path.stat().st_size != len(data):
                return False
            view = memoryview(data)
            # bytes compare with memcmp, memoryviews item by item
            return all(file.read(_CHUNK) == bytes(view[at : at + _CHUNK]) for at in range(0, len(data), _CHUNK))
    except FileNotFoundError:
        return False
