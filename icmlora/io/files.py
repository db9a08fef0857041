"""Read untrusted files through `registry.files`, with this package's errors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from icmlora.errors import AdapterRefused, UnsafeInput
from registry import files
from registry.errors import SourceRefused

_BLOCK = 1 << 20
_ANY_SIZE = 2**62


@dataclass(frozen=True)
class HashedFile:
    """A regular file and its checksum."""

    path: Path
    digest: str  # SHA-256
    status: os.stat_result

    def is_unchanged(self) -> bool:
        """Return whether the path still leads to this file, unmodified since it was hashed."""
        try:
            now = self.path.lstat()
        except OSError:
            return False
        return files.identity(now) == files.identity(self.status)


@contextmanager
def open_regular(path: Path, *, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Open a regular file of bounded size and yield its descriptor and size; see `registry.files.open_plain`."""
    with _refusals(), files.open_plain(path, max_bytes=max_bytes) as opened:
        yield opened


def read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset`."""
    with _refusals():
        return files.read_exactly(descriptor, size, offset)


def read_regular(path: Path, *, max_bytes: int, first: files.CheckFirst | None = None) -> bytes:
    """Read a whole regular file of bounded size, unless `first` refuses it."""
    with _refusals():
        return files.read_plain(path, max_bytes=max_bytes, first=first)


def hash_regular(path: Path) -> HashedFile:
    """Hash a regular file of any size in bounded memory."""
    with open_regular(path, max_bytes=_ANY_SIZE) as (descriptor, size):
        return HashedFile(path, hash_open(descriptor, size), os.fstat(descriptor))


def hash_open(descriptor: int, size: int) -> str:
    """Return the SHA-256 of the first `size` bytes of an open file, in hexadecimal."""
    digest = hashlib.sha256()
    for start in range(0, size, _BLOCK):
        digest.update(read_exactly(descriptor, min(_BLOCK, size - start), start))
    return digest.hexdigest()


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except SourceRefused as error:
        kind = AdapterRefused if error.reason == "unreadable" else UnsafeInput
        raise kind(error.message, kind=error.reason, path=error.path, hint=error.hint) from None
