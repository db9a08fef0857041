"""A local cache of blobs from remote storage: a blob that was read once needs no network again.

    FOLDER/3/3f9a...    one blob; its file time is the time of the last read
    FOLDER/lock         locked to free space; holds an upper bound of the bytes of all files

    read ──▶ here, and its bytes have the digest ──▶ done
        `──▶ not here: fetched, verified ──▶ a temporary name ──▶ renamed       any number of processes

Nothing here is needed: damaged or unwritten copies are fetched again. So nothing is synced, and no error of this folder
is an error of the store. The least recently read blobs are deleted first.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from uuid import uuid4

from registry import files as fs
from registry.files import Bytes

_SHARE = 0.5
"""The default limit, as a share of the free space."""
_ROOM = 0.9
"""The share of the limit that a trim leaves, so that not every new blob causes one."""
_ABANDONED = 3600.0  # seconds after which a temporary file counts as left by a killed process
_DIGITS = "0123456789abcdef"


class BlobCache:
    """Copies of blobs in a folder that processes share.

    Args:
        folder: The folder, or a function that returns it; created with the first copy, for this user only.
        limit: Maximum bytes of all copies; by default half of the free space.
    """

    def __init__(self, folder: Path | Callable[[], Path], limit: int | None = None) -> None:
        self._folder, self._limit = folder, limit

    def get(self, digest: str) -> bytes | None:
        """Return the bytes of a blob if cached and undamaged."""
        path = self._path(digest)
        try:
            with fs.open_own(path) as file:
                data = file.read()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != digest:
            fs.discard(path)
            return None
        with suppress(OSError):
            os.utime(path)
        return data

    def start(self, digest: str, size: int) -> bytes | None:
        """Return the first bytes of a blob if cached, unverified."""
        try:
            with fs.open_own(self._path(digest)) as file:
                return file.read(size) or None
        except OSError:
            return None

    def put(self, digest: str, data: Bytes) -> None:
        """Cache the bytes of a blob, which the caller has verified; ignore failures."""
        path = self._path(digest)
        with suppress(OSError):
            self._make_folders()
            temporary = path.with_name(f"{uuid4().hex}.tmp")
            try:
                with self._created(temporary, len(data)) as descriptor:
                    fs.write(descriptor, data)
                fs.replace(temporary, path)
            finally:
                fs.discard(temporary)

    @cached_property
    def folder(self) -> Path:
        """The folder."""
        return self._folder if isinstance(self._folder, Path) else self._folder()

    @cached_property
    def limit(self) -> int:
        """The maximum bytes of all copies."""
        if self._limit is not None:
            return self._limit
        return int((shutil.disk_usage(self.folder).free + sum(size for _, size, _ in self._files())) * _SHARE)

    def _path(self, digest: str) -> Path:
        return self.folder / digest[0] / digest

    def _make_folders(self) -> None:
        if not (self.folder / _DIGITS[-1]).is_dir():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for digit in _DIGITS:
                fs.make_dir(self.folder / digit)

    @contextmanager
    def _created(self, path: Path, size: int) -> Iterator[int]:
        """Create a file of this size, after deleting others if needed; yield its descriptor.

        Raises:
            OSError: It exceeds the cache, or writing failed.
        """
        if size > self.limit * _ROOM:
            raise OSError(errno.EFBIG, "larger than the whole cache")
        descriptor = fs.create(path, 0o600)
        try:
            with self._locked() as lock:
                text = os.read(lock, 32)
                taken = int(text) if text.isdigit() else self.limit
                if taken + size > self.limit:
                    taken = self._trim(int(self.limit * _ROOM) - size)
                # Never too low: the next trim corrects for replaced and removed files.
                os.ftruncate(lock, 0)
                os.lseek(lock, 0, os.SEEK_SET)
                fs.write(lock, str(taken + size).encode())
                os.ftruncate(descriptor, size)  # others count it while it is written
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = fs.open_file(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fs.lock(descriptor, "alone", wait=True)  # at most the time to list the folder
            yield descriptor
        finally:
            os.close(descriptor)

    def _trim(self, most: int) -> int:
        """Delete the least recently read files until at most `most` bytes are left; return the bytes left."""
        files = sorted(self._files())
        left = sum(size for _, size, _ in files)
        for modified, size, path in files:
            is_abandoned = path.suffix and time.time() - modified > _ABANDONED
            if is_abandoned or (left > most and not path.suffix):
                fs.discard(path)
                left -= size
        return left

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield the time, the size and the path of every file."""
        for digit in _DIGITS:
            with suppress(FileNotFoundError), os.scandir(self.folder / digit) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):  # another process removed or renamed it
                        status = entry.stat(follow_symlinks=False)
                        yield status.st_mtime, status.st_size, Path(entry.path)
