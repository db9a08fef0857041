"""Copies of blobs from a remote place, on this machine, so that each is fetched once.

    FOLDER/3/3f9a...    one blob; the time of its file is when it was read last
    FOLDER/lock         locked to make room; holds an upper bound of the bytes in use

    read ──▶ here, and its bytes have the digest ──▶ done
        `──▶ not here: fetched, verified ──▶ a temporary name ──▶ renamed       any number of processes

Every file can be fetched again, also if it is damaged or cannot be written. So nothing is synced, and no error of
this folder is one of the store. Blobs that were read longest ago make room.
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
"""Of the space that is free, what the copies may take unless a limit is given."""
_ROOM = 0.9
"""Share of the limit that remains after trimming, so that not every blob causes a trim."""
_ABANDONED = 3600.0  # seconds after which a temporary file counts as abandoned
_DIGITS = "0123456789abcdef"


class BlobCache:
    """Copies of blobs in a folder that processes share.

    Args:
        folder: Where they are, or what returns it; it is made, for this user alone, when the first copy is kept.
        limit: Bytes that they may take; by default half of the space that is free.
    """

    def __init__(self, folder: Path | Callable[[], Path], limit: int | None = None) -> None:
        self._folder, self._limit = folder, limit

    def get(self, digest: str) -> bytes | None:
        """Return the bytes of a blob if they are here, and are the right ones."""
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
        """Return the first bytes of a blob if it is here; they are not verified."""
        try:
            with fs.open_own(self._path(digest)) as file:
                return file.read(size) or None
        except OSError:
            return None

    def put(self, digest: str, data: Bytes) -> None:
        """Keep the bytes of a blob, which the caller has verified; do nothing where that cannot be done."""
        path = self._path(digest)
        with suppress(OSError):
            if not (self.folder / _DIGITS[-1]).is_dir():
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                for digit in _DIGITS:
                    fs.make_dir(self.folder / digit)
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
        """How many bytes the copies may take."""
        if self._limit is not None:
            return self._limit
        return int((shutil.disk_usage(self.folder).free + sum(size for _, size, _ in self._files())) * _SHARE)

    def _path(self, digest: str) -> Path:
        return self.folder / digest[0] / digest

    @contextmanager
    def _created(self, path: Path, size: int) -> Iterator[int]:
        """Create a file of some length that fits with all others, after deleting some of them; yield its descriptor.

        Raises:
            OSError: It never fits, or something else.
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
                # An upper bound: the next trim notices replaced and removed files.
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
            fs.lock(descriptor, "alone", wait=True)  # for as long as it takes to list the folder, at most
            yield descriptor
        finally:
            os.close(descriptor)

    def _trim(self, most: int) -> int:
        """Delete the least recently read files down to a number of bytes; return the bytes left."""
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
