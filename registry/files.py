"""The seam between the store and the operating system.

Every write, fsync, rename and unlink of the store goes through this module, so that tests can count them, let the
n-th one fail, or kill the process between two of them.

Read files that others made: plain files only, within a limit, unchanged from first to last byte.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from registry.errors import SourceChanged, SourceRefused, StoreFull, StoreIOError, StoreReadOnly

Bytes = bytes | bytearray | memoryview

_FULL = {errno.ENOSPC, errno.EDQUOT}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # macOS has none
# Below, waiting for the device takes longer than the copy to the page cache that it saves.
_DIRECT_BYTES = 512 << 10


def failpoint(name: str) -> None:
    """Kill this process here, as power loss would, if the environment variable ICM_FAILPOINT says so.

    The variable holds `NAME`; it exists for crash tests and costs one dictionary look-up otherwise.
    """
    if os.environ.get("ICM_FAILPOINT") == name:
        os.kill(os.getpid(), signal.SIGKILL)


def create(path: Path, mode: int) -> int:
    """Create a file that must not exist and return its descriptor, open for writing; the umask applies to `mode`."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, mode)


def write(fd: int, data: Bytes) -> None:
    """Write all of `data`; the kernel may take a part of it at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_past_cache(fd: int, data: Bytes) -> None:
    """Write all of `data` to a file that is empty, and what is worth it past the page cache.

    Those are the whole pages of large data that begins on a page. The rest, and everything where the file system does
    not allow it, goes through the cache: so nothing is padded, and the file is never longer than `data`.
    """
    rest = memoryview(data)
    if _DIRECT and len(rest) >= _DIRECT_BYTES:
        done = len(rest) // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, _DIRECT)
            write(fd, rest[:done])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            done = os.lseek(fd, 0, os.SEEK_CUR)  # the file system cannot, or not from this place in memory
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        rest = rest[done:]
        failpoint("pages-written")
    write(fd, rest)


def fsync(fd: int) -> None:
    """Wait until the file's bytes are on the device."""
    os.fsync(fd)


def replace(source: Path, target: Path) -> None:
    """Rename over whatever `target` was; atomic, and durable once the folder is synced."""
    os.replace(source, target)


def unlink(path: Path) -> None:
    """Remove a file; one that is gone already is fine."""
    path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a temporary file while another error is on its way; if that fails too, prune finds the file."""
    with suppress(OSError):
        unlink(path)


def make_dir(path: Path) -> None:
    """Create a folder unless it exists."""
    path.mkdir(exist_ok=True)


def fsync_dir(path: Path) -> None:
    """Wait until the folder's entries (renames, new files) are on the device."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync(fd)
    finally:
        os.close(fd)


def write_unsynced(path: Path, data: Bytes, mode: int) -> int:
    """Create `path` with these bytes and return its descriptor, to be given to `sync_and_close`.

    The file is removed again when that fails.
    """
    fd = create(path, mode)
    try:
        write_past_cache(fd, data)
    except BaseException:
        os.close(fd)
        discard(path)
        raise
    return fd


def sync_and_close(fd: int) -> None:
    """Wait until the file's bytes are on the device, and let go of it, also when that fails."""
    try:
        fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: Bytes, mode: int) -> None:
    """Create `path` with these bytes and sync it; the file is removed again when that fails."""
    fd = write_unsynced(path, data, mode)
    try:
        sync_and_close(fd)
    except BaseException:
        discard(path)
        raise


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into the store's own error about `path`.

    Raises:
        StoreFull: no space or quota left.
        StoreReadOnly: the file system or the permissions forbid it.
        StoreIOError: anything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            hint = "`icm prune` frees what no row refers to; it works on a full disk"
            raise StoreFull(f"no space left while writing {path}", path=path, hint=hint) from error
        if error.errno in _READ_ONLY:
            hint = "check the owner and the permissions of the store folder"
            raise StoreReadOnly(f"cannot write {path}: {error.strerror}", path=path, hint=hint) from error
        raise StoreIOError(f"{path}: {error.strerror or error}", path=path) from error


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
