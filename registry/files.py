"""The seam to the operating system: durable writing, and careful reading of files that others made.

Every write, sync, rename and removal of the store goes through this module, so that tests can count them, let the n-th
one fail, or kill the process between two of them.

    writing   new file ──fsync──▶ rename ──▶ fsync of the folder       after a crash: there in full, or not at all
    reading   no symbolic link, regular files only, a size limit, unchanged from the first to the last byte
    locking   shared, or alone; the system drops a lock when its process dies

What only POSIX has is asked for here and left out where it is missing, as on Windows.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

from registry.errors import SourceChanged, SourceRefused, StoreFull, StoreIOError, StoreReadOnly

Bytes = bytes | bytearray | memoryview

# An adapter is megabytes; 8 GiB is far above the largest one and still below what would hurt a machine that can use it.
MAX_SOURCE_BYTES = 8 << 30

LockKind = Literal["shared", "alone"]

CheckFirst = Callable[[int, int], None]
"""Looks at an open file, given its descriptor and size, and raises to refuse it before all of it is in memory."""

_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
_CANNOT_LINK = {errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_SPECIAL = {errno.ENXIO, errno.ENODEV}  # such as a socket
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
# O_BINARY: without it, Windows would change line ends.
_AS_IT_IS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
# Without it, opening a pipe without a writer would block forever.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)


def failpoint(name: str) -> None:
    """Kill this process here, as power loss would, if the environment variable ICM_FAILPOINT holds `name`."""
    if os.environ.get("ICM_FAILPOINT") == name:  # one look-up; only crash tests set it
        os.kill(os.getpid(), signal.SIGKILL)


def open_file(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open a file that is no symbolic link and return its descriptor, which processes started later do not get."""
    return os.open(path, flags | _AS_IT_IS, mode)


def create(path: Path, mode: int) -> int:
    """Create a file that must not exist and return its descriptor, open for writing; the umask applies to `mode`."""
    return open_file(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)


def lock(fd: int, kind: LockKind, *, wait: bool = False) -> bool:
    """Lock an open file, or turn its lock into another one, and return whether that went; if not, it has none."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return _lock_on_windows(fd, kind, wait=wait)
    # portalocker would call this too, but importing it takes as long as a seventh of a short command.
    flags = fcntl.LOCK_SH if kind == "shared" else fcntl.LOCK_EX
    try:
        fcntl.flock(fd, flags if wait else flags | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_on_windows(fd: int, kind: LockKind, *, wait: bool) -> bool:
    import portalocker

    unlock(fd)  # a lock does not turn into another one
    flags = portalocker.LOCK_SH if kind == "shared" else portalocker.LOCK_EX
    while True:
        try:
            portalocker.lock(fd, flags if wait else flags | portalocker.LOCK_NB)
            return True
        except portalocker.AlreadyLocked:
            if not wait:  # it waits for ten seconds at a time
                return False
        except portalocker.LockException as error:
            raise OSError(errno.ENOLCK, str(error)) from error


def unlock(fd: int) -> None:
    """Release the lock of an open file."""
    try:
        import fcntl
    except ModuleNotFoundError:
        import portalocker

        portalocker.unlock(fd)
    else:
        fcntl.flock(fd, fcntl.LOCK_UN)


def write(fd: int, data: Bytes) -> None:
    """Write all of `data`; the kernel may take a part of it at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def fsync(fd: int) -> None:
    """Wait until the file's bytes are on the device."""
    os.fsync(fd)


def replace(source: Path, target: Path) -> None:
    """Rename a file, replacing `target`; atomic, and durable once the folder is synced."""
    os.replace(source, target)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file to a name that nothing has; atomic, and durable once the folder is synced.

    Where the file system has no hard links, such as FAT, the name is looked at and then taken.

    Raises:
        FileExistsError: Something has the name.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.replace(source, target)
    else:
        unlink(source)


def exchange(first: Path, second: Path, aside: Path) -> None:
    """Swap the names of two files or folders; atomic where the file system supports it, else through a third name."""
    if _exchanged(first, second):
        return
    done: list[tuple[Path, Path]] = []
    try:
        for old, new in ((first, aside), (second, first), (aside, second)):
            os.rename(old, new)
            done.append((new, old))
    except OSError:
        for new, old in reversed(done):
            os.rename(new, old)
        raise


def _exchanged(first: Path, second: Path) -> bool:
    if sys.platform != "linux":
        return False
    import ctypes  # needed to replace a folder only

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # of new C libraries
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(first), here, os.fsencode(second), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


def unlink(path: Path) -> None:
    """Remove a file; do nothing if it is gone already."""
    path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a temporary file while another error is on its way; if that fails too, prune finds the file."""
    with suppress(OSError):
        unlink(path)


def make_dir(path: Path) -> None:
    """Create a folder unless it exists."""
    path.mkdir(exist_ok=True)


def fsync_dir(path: Path) -> None:
    """Wait until the folder's entries (renames, new files) are on the device; Windows does not let one wait."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync(fd)
    finally:
        os.close(fd)


def listed(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the name of each file in a folder, in order, and its status, unless another process removes it."""
    # From an open folder where that can be: to follow the whole path for each takes longer.
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY) if os.stat in os.supports_dir_fd else None
    try:
        for name in sorted(os.listdir(folder if fd is None else fd)):
            with suppress(FileNotFoundError):
                yield name, os.stat(folder / name if fd is None else name, dir_fd=fd)
    finally:
        if fd is not None:
            os.close(fd)


def write_file(path: Path, data: Bytes, mode: int = 0o666) -> None:
    """Create `path` with these bytes and sync it, or leave nothing; the name is durable after `fsync_dir`."""
    fd = create(path, mode)
    try:
        try:
            write(fd, data)
            fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        discard(path)
        raise


def is_full(error: BaseException) -> bool:
    """Return whether an exception means that no space is left on the device."""
    return isinstance(error, StoreFull) or (isinstance(error, OSError) and error.errno in _FULL)


@contextmanager
def store_errors(path: Path | str) -> Iterator[None]:
    """Turn an OSError of the block into the store's own error about `path`."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            hint = "run `icm prune` to free unused blobs; it also works on a full disk"
            raise StoreFull(f"no space left while writing {path}", path=path, hint=hint) from error
        if error.errno in _READ_ONLY:
            hint = "check the owner and permissions of the store folder"
            raise StoreReadOnly(f"cannot write {path}: {error.strerror}", path=path, hint=hint) from error
        raise StoreIOError(f"{path}: {error.strerror or error}", path=path) from error


def open_own(path: Path | str) -> BinaryIO:
    """Open a file of the store to read it. Anything else in its place, such as a pipe, reads as an empty file."""
    try:
        fd = os.open(path, os.O_RDONLY | _AT_ONCE | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno in _SPECIAL:
            return BytesIO()
        raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    return BytesIO()


@contextmanager
def open_plain(path: Path, *, max_bytes: int = MAX_SOURCE_BYTES) -> Iterator[tuple[int, int]]:
    """Open a regular file of bounded size and yield its descriptor and its size in bytes.

    Read it with :func:`read_exactly`, never through a mapping: a mapped file that shrinks kills the process.
    """
    try:
        fd = open_file(path, os.O_RDONLY | _AT_ONCE)
    except OSError as error:
        raise _not_opened(path, error) from error
    try:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode):
            raise _special(path)
        if before.st_size > max_bytes:
            fact = f"is {before.st_size:,} bytes; the limit is {max_bytes:,}"
            raise SourceRefused(fact, reason="limits", path=path)
        yield fd, before.st_size
        try:
            after = os.stat(path, follow_symlinks=False)
        except OSError as error:
            raise SourceRefused(f"cannot be read: {error.strerror}", reason="unreadable", path=path) from error
    finally:
        os.close(fd)
    if identity(before) != identity(after):
        hint = "run the command again when no program is writing to it"
        raise SourceChanged("changed while being read", reason="changed", path=path, hint=hint)


def read_exactly(fd: int, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset` of an open file, into memory that is taken once.

    Raises:
        SourceChanged: The file was cut.
    """
    whole, done = BytesIO(bytes(size)), 0
    with whole.getbuffer() as view:
        while done < size:  # Linux reads at most 2 GiB in one call
            count = _read_into(view[done:], fd, offset + done)
            if count == 0:
                raise SourceChanged("was truncated while being read", reason="changed")
            done += count
    return whole.getvalue()  # the same memory: there is no other reference


def _read_into(view: memoryview, fd: int, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    with open(fd, "rb", buffering=0, closefd=False) as file:
        file.seek(offset)
        return file.readinto(view)


def read_plain(path: Path, *, max_bytes: int = MAX_SOURCE_BYTES, first: CheckFirst | None = None) -> bytes:
    """Read a whole regular file of bounded size; `first` may refuse it before that."""
    try:
        with open_plain(path, max_bytes=max_bytes) as (fd, size):
            if first is not None:
                first(fd, size)
            return read_exactly(fd, size, 0)
    except SourceChanged as error:
        error.path = str(path)
        raise


def _not_opened(path: Path, error: OSError) -> SourceRefused:
    if error.errno == errno.ELOOP:
        return SourceRefused("is a symbolic link, which icm does not follow", reason="symlink", path=path)
    if error.errno in _SPECIAL:
        return _special(path)
    return SourceRefused(f"cannot be read: {error.strerror}", reason="unreadable", path=path)


def _special(path: Path) -> SourceRefused:
    hint = "specify the file itself, not a link or a device"
    return SourceRefused("not a regular file", reason="special-file", path=path, hint=hint)


def identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return a key of a file's present state: it differs for other files, and after each write."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
