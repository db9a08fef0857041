"""Careful reading of files from outside, and durable writing of our own.

Reading: no symbolic link, regular files only, a size limit, pread instead of mmap (a file that shrinks under an mmap
kills the process), and the same size, time and inode after the last read as before the first.
Writing: a temporary file beside the target, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icmlora.errors import AdapterRefused, UnsafeInput, located

_CHUNK = 8 * 1024 * 1024
# O_NONBLOCK: opening a FIFO that nobody writes to would otherwise wait for ever.
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@contextmanager
def open_regular(path: Path, *, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Open a regular file of bounded size and yield its descriptor and size.

    Raises:
        UnsafeInput: A symbolic link, a special file, too large, or changed while it was read.
        AdapterRefused: Missing or unreadable.
    """
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeInput("a symbolic link is not followed", kind="symlink") from None
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise UnsafeInput("not a regular file", kind="special-file") from None
        raise AdapterRefused(f"cannot be read: {error.strerror}", kind="unreadable") from None
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise UnsafeInput("not a regular file", kind="special-file")
        if before.st_size > max_bytes:
            message = f"has {before.st_size:,} bytes, more than {max_bytes:,}"
            raise UnsafeInput(message, kind="limits")
        yield descriptor, before.st_size
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if _identity(before) != _identity(after):
        raise UnsafeInput("changed while it was read", kind="changed", hint="try again when nothing writes it")


def read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset` with pread.

    Raises:
        UnsafeInput: The file ends early: it was cut while it was read.
    """
    parts = bytearray()
    while len(parts) < size:
        part = os.pread(descriptor, min(_CHUNK, size - len(parts)), offset + len(parts))
        if not part:
            raise UnsafeInput("was cut while it was read", kind="changed")
        parts += part
    return bytes(parts)


def read_regular(path: Path, *, max_bytes: int) -> bytes:
    """Read a whole regular file of bounded size.

    Raises:
        UnsafeInput: As `open_regular`.
        AdapterRefused: As `open_regular`.
    """
    with located(path), open_regular(path, max_bytes=max_bytes) as (descriptor, size):
        return read_exactly(descriptor, size, 0)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is there in full or not at all; the mode is `0666 & ~umask`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write_synced(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Create a file and make its content durable; its name is durable only after `fsync_folder`."""
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
