"""Read files that others made: plain files only, within a limit, unchanged from first to last byte."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from registry.errors import SourceChanged, SourceRefused

MAX_SOURCE_BYTES = 8 << 30
# An adapter is megabytes; 8 GiB is far above the largest and still below what would hurt a machine that can use it.


def source_size(path: Path) -> int:
    """Return the size of a plain file in bytes without opening it.

    Raises:
        SourceRefused: it is absent, a link, a device, a pipe or too large.
    """
    try:
        status = os.lstat(path)
    except OSError as error:
        raise SourceRefused(f"cannot read {path}: {error.strerror}", path=path) from error
    return _check(path, status).st_size


def read_source(path: Path, memory: memoryview) -> memoryview:
    """Fill `memory`, which is as long as the file was found to be, with the bytes of a plain file.

    The file is read with read(2), never mapped: a mapped file that shrinks kills the process.

    Returns:
        The same memory, read-only.

    Raises:
        SourceRefused: it is absent, a link, a device, a pipe or too large.
        SourceChanged: it changed meanwhile.
    """
    # Without O_NONBLOCK, opening a pipe would wait for somebody to write to it.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise SourceRefused(f"cannot read {path}: {reason}", path=path) from error
    try:
        before = _check(path, os.fstat(fd))
        is_full = before.st_size == len(memory) and _fill(memory, fd)
        named = os.stat(path, follow_symlinks=False)
    except OSError as error:
        raise SourceRefused(f"cannot read {path}: {error.strerror}", path=path) from error
    finally:
        os.close(fd)
    if not is_full or _identity(before) != _identity(named):
        raise SourceChanged(f"{path} changed while it was read", path=path, hint="try again when it is written")
    return memory.toreadonly()


def _check(path: Path, status: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        raise SourceRefused(f"{path} is no regular file", path=path, hint="give the file itself, not a link or device")
    if status.st_size > MAX_SOURCE_BYTES:
        raise SourceRefused(f"{path} has {status.st_size} bytes, the limit is {MAX_SOURCE_BYTES}", path=path)
    return status


def _fill(memory: memoryview, fd: int) -> bool:
    """Read until the memory is full, and say whether it is; the file may have become shorter."""
    rest = memory
    while rest and (count := os.readv(fd, [rest])):
        rest = rest[count:]
    return not rest


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
