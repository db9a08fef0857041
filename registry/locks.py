"""Locks between processes: one for the store, and one for the jobs of each base model.

    store lock   shared while a process uses the store, exclusive while one deletes bytes
    job lock     exclusive while a process trains, updates or evicts for one base model, shared while processes encode
                 tasks of it

Both are flocks. The kernel drops a lock when its process dies, so there are no stale locks and no command to break one.
The names in a lock file are only for the error message.

An flock gives up the shared lock while it turns into an exclusive one, and may lose it if the attempt fails. So whoever
wants the exclusive lock first holds a second file, the gate: in between, no other process can get in to delete.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from registry.errors import StoreLocked
from registry.files import store_errors

_POLL_SECONDS = 0.05
_MAX_NAMES_BYTES = 4096


class FileLock:
    """An flock on one file, held until :meth:`close`."""

    def __init__(
        self, path: Path, *, timeout: float, command: str, writable: bool = True, subject: str | None = None
    ) -> None:
        """Open the lock file without taking the lock; `command` is what others see of this process."""
        self._path = path
        self._timeout = timeout
        self._command = " ".join(command.split())[:200]
        self._writable = writable
        self._subject = subject or f"the store {path.parent}"
        self._fd = _open(path, writable=writable)

    def share(self) -> None:
        """Take, or go back to, the shared lock."""
        self._wait(self._fd, fcntl.LOCK_SH)
        self._sign()

    def hold(self) -> None:
        """Take the exclusive lock until :meth:`close`."""
        self._wait(self._fd, fcntl.LOCK_EX)
        self._sign()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait for the exclusive lock, hold it for a block, then go back to the shared one.

        The shared lock is given up while this waits, so nothing read before the block may be trusted inside it.
        """
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # two that wait for each other's shared lock would wait for ever
        try:
            with self._gate() as gate:
                self._wait(gate, fcntl.LOCK_EX)
                try:
                    self.hold()
                    yield
                finally:
                    self.share()  # before the gate opens
        except StoreLocked:
            self.share()
            raise

    @contextmanager
    def try_exclusive(self) -> Iterator[bool]:
        """Hold the exclusive lock for a block if no other process uses the store, and yield whether it is held."""
        # The gate stays closed while the lock changes, so what was read before the block is still so inside it.
        with self._gate() as gate:
            if not _try(gate, fcntl.LOCK_EX):
                yield False
                return
            try:
                yield _try(self._fd, fcntl.LOCK_EX)
            finally:
                self._wait(self._fd, fcntl.LOCK_SH)  # a failed attempt loses the shared lock too

    def close(self) -> None:
        """Give up the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @contextmanager
    def _gate(self) -> Iterator[int]:
        path = self._path.with_name(f"{self._path.name}.gate")
        with store_errors(path):
            fd = _open(path, writable=True)
        try:
            yield fd
        finally:
            os.close(fd)

    def _wait(self, fd: int, kind: int) -> None:
        deadline = time.monotonic() + self._timeout
        while not _try(fd, kind):
            if time.monotonic() >= deadline:
                raise self._locked()
            time.sleep(_POLL_SECONDS)

    def _sign(self) -> None:
        """Add this process to the names in the file, which is cut now and then so that it cannot grow."""
        if not self._writable:
            return
        with suppress(OSError):  # a full disk must not stop the command that frees it
            if os.fstat(self._fd).st_size > _MAX_NAMES_BYTES:
                os.ftruncate(self._fd, 0)
            os.write(self._fd, f"{os.getpid()} {self._command}\n".encode())

    def _locked(self) -> StoreLocked:
        holders = "; ".join(f"pid {pid}, {command}" for pid, command in self._holders().items())
        message = f"{self._subject} is in use" + (f" by {holders}" if holders else "")
        hint = f"waited {self._timeout:g} s; let it finish, or wait longer with --lock-timeout"
        return StoreLocked(message, path=self._path, hint=hint)

    def _holders(self) -> dict[int, str]:
        """Return pid -> command of the processes in the file that are alive; some may have released it already."""
        found: dict[int, str] = {}
        # Anybody may have written to the file, so nothing in it is trusted but the number of a live process.
        for line in self._path.read_text(errors="replace").splitlines():
            pid, _, command = line.partition(" ")
            if pid.isdigit() and int(pid) != os.getpid() and _is_alive(int(pid)):
                found[int(pid)] = command
        return found


def _is_alive(pid: int) -> bool:
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
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def _try(fd: int, kind: int) -> bool:
    """Take a lock unless another open file has it."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
