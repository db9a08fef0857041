"""Locks of a store folder: one on a file of the store, and one on a file for each base model.

The kernel drops a lock when its process dies, so there are no stale locks and no command to break one. The names in a
lock file are only for messages.

Converting a shared lock into an exclusive one releases it, and loses it if the attempt fails. So a process that wants
the exclusive lock first locks a second file, the gate, and no other process can get in to delete. New readers let the
process that just closed the gate go first.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from registry import files as fs
from registry.files import LockKind, store_errors
from registry.storage.locks import HEAD_START, Deadline, in_use

_MAX_NAMES_BYTES = 4096
_KEPT_NAMES = 16  # of others that are alive, when the file is cut
_NAMED = 3  # holders that a message names
_LOCK = re.compile(r"\d+: (?:FLOCK|POSIX) +\S+ +\S+ (\d+) [0-9a-f]+:[0-9a-f]+:(\d+) ")


class FileLock:
    """A lock on one file, held until :meth:`close`."""

    def __init__(
        self, path: Path, *, deadline: Deadline, command: str, writable: bool = True, subject: str | None = None
    ) -> None:
        """Open the lock file without taking the lock; `command` is what others see of this process."""
        self._path = path
        self._patience = deadline
        self._command = " ".join(command.split())[:200]
        self._writable = writable
        self._subject = subject or f"the store {path.parent}"
        self._fd = _open(path, writable=writable)

    def enter(self) -> None:
        """Acquire the shared lock for the first time, after commands that just began to wait for the exclusive one."""
        with suppress(OSError):  # the gate was never closed, or it cannot be read
            gate = fs.open_file(self._gate_path, os.O_RDONLY)
            try:
                self._patience.wait(lambda: _has_waited(gate) or _try(gate, "shared"))
            finally:
                os.close(gate)
        self.share()

    def share(self) -> None:
        """Acquire, or return to, the shared lock."""
        self._wait(self._fd, "shared")
        self._sign()

    def hold(self, *, shared: bool = False, without: FileLock | None = None) -> None:
        """Acquire the exclusive lock, or the shared one, until :meth:`close`.

        The lock `without` is given up while this waits, so nothing read before may be trusted afterwards.
        """
        kind: LockKind = "shared" if shared else "alone"
        if not _try(self._fd, kind):
            with nullcontext() if without is None else without._given_up():
                self._wait(self._fd, kind)
        self._sign()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait for the exclusive lock, hold it for a block, then go back to the shared one.

        The shared lock is given up while this waits, so nothing read before the block may be trusted inside it.
        """
        with self._given_up(), self._gate() as gate:
            self._wait(gate, "alone")
            with suppress(OSError):
                os.utime(gate)
            try:
                self.hold()
                yield
            finally:
                _try(self._fd, "shared")  # before the gate opens; no other process can have entered

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        """Release the shared lock for a block, then acquire it again."""
        fs.unlock(self._fd)  # two that wait for each other's shared lock would wait for ever
        try:
            yield
        except BaseException:
            _try(self._fd, "shared")  # report the first error, not that this takes time too
            raise
        self._wait(self._fd, "shared")

    def users_of(self, path: Path) -> str:
        """Return the processes that have locked another file of the store, as ` by process 12: icm ls`, if known."""
        signed, holding = self._signed(), _lock_holders(path) - {os.getpid()}
        return _named({pid: signed.get(pid, "") for pid in sorted(holding)}, " by ")

    def close(self) -> None:
        """Release the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def _gate_path(self) -> Path:
        return self._path.with_name(f"{self._path.name}.gate")

    @contextmanager
    def _gate(self) -> Iterator[int]:
        with store_errors(self._gate_path):
            fd = _open(self._gate_path, writable=True)
        try:
            yield fd
        finally:
            os.close(fd)

    def _wait(self, fd: int, kind: LockKind) -> None:
        if not self._patience.wait(lambda: _try(fd, kind), lambda: f"{self._subject}{self._held(fd, ', held by ')}"):
            raise in_use(f"{self._subject} is in use{self._held(fd, ' by ')}", self._patience, self._path)

    def _sign(self) -> None:
        """Add this process to the names in the file, which is cut now and then so that it cannot grow."""
        if not self._writable:
            return
        names = {os.getpid(): self._command}
        with suppress(OSError):  # a full disk must not stop the command that frees it
            if os.fstat(self._fd).st_size > _MAX_NAMES_BYTES:
                names = dict([*self._signed().items()][-_KEPT_NAMES:]) | names
                os.ftruncate(self._fd, 0)
            os.write(self._fd, "".join(f"{pid} {command[:200]}\n" for pid, command in names.items()).encode())

    def _held(self, fd: int, before: str) -> str:
        """Return a phrase that names the holders of a lock; empty if unknown."""
        signed = self._signed()
        holding = _lock_holders(fd) - {os.getpid()}
        # Without word from the kernel, all who signed and are alive; some of them may have released it already.
        return _named({pid: signed.get(pid, "") for pid in sorted(holding)} if holding else signed, before)

    def _signed(self) -> dict[int, str]:
        """Return pid -> command of the other processes in the file that are alive."""
        found: dict[int, str] = {}
        # Anybody may have written to the file, so nothing in it is trusted but the number of a live process.
        with suppress(OSError):
            for line in self._path.read_text(errors="replace").splitlines():
                pid, _, command = line.partition(" ")
                if pid.isdigit() and int(pid) != os.getpid() and _is_alive(int(pid)):
                    found[int(pid)] = command
        return found


class FolderLock(FileLock):
    """The locks of a store folder: see `registry.storage.locks.StoreLock`."""

    def __init__(
        self, path: Path, jobs: Callable[[str], Path], *, deadline: Deadline, command: str, writable: bool = True
    ) -> None:
        """Open the lock file of the store; `jobs` says which file is locked for the jobs of a base model."""
        super().__init__(path, deadline=deadline, command=command, writable=writable)
        self._jobs = jobs

    @contextmanager
    def job(self, base_model: str, *, shared: bool = False) -> Iterator[None]:
        """Hold the job lock of a base model for a block."""
        path, subject = self._jobs(base_model), f"base model {base_model!r}"
        with store_errors(path):
            # The first job of a store makes the folder.
            path.parent.mkdir(exist_ok=True)
            lock = FileLock(path, deadline=self._patience, command=self._command, subject=subject)
        try:
            # Not reentrant: a job does not start another one.
            lock.hold(shared=shared, without=self)
            yield
        finally:
            lock.close()


def _named(holders: Mapping[int, str], before: str) -> str:
    """Name some processes after some words."""
    names = [f"process {pid}{command and ': '}{command}" for pid, command in holders.items()]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return before + "; ".join(names[:_NAMED]) + more if names else ""


def _lock_holders(file: Path | int) -> set[int]:
    """Return the processes that hold a lock on a file, from Linux's lock table; remote ones have no number here."""
    try:
        # By its path if it is not open: to close a file drops the locks that SQLite has on it.
        inode, lines = os.stat(file).st_ino, Path("/proc/locks").read_text().splitlines()
    except OSError:
        return set()
    found = filter(None, map(_LOCK.match, lines))  # those that wait are listed with an arrow
    return {int(match[1]) for match in found if int(match[2]) == inode} - {0}


def _has_waited(gate: int) -> bool:
    """Return whether a closed gate has had its head start."""
    return not 0 <= time.time() - os.fstat(gate).st_mtime < HEAD_START


def _is_alive(pid: int) -> bool:
    if os.name == "nt":
        return False  # unknown: the check below would send Ctrl+C there
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _open(path: Path, *, writable: bool) -> int:
    # O_APPEND: several processes may sign at the same time.
    flags = (os.O_RDWR | os.O_CREAT | os.O_APPEND) if writable else os.O_RDONLY
    return fs.open_file(path, flags)


def _try(fd: int, kind: LockKind) -> bool:
    """Acquire a lock unless another open file has it."""
    return fs.lock(fd, kind)
