"""Folders of written adapters, each named by the digest of its inputs.

    ROOT/sha256-<64 hex>/     complete and never changed, or absent
    ROOT/.lock                shared lock while the folders are in use, exclusive to delete some

An engine reopens a folder after it has evicted the adapter from memory, so folders that a running process may have
passed to an engine are not deleted. Folders can be written again, so they are in memory by default.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from icmlora.errors import FoldersInUse, FoldersUnusable, OutputExists
from icmlora.io.staging import remove_all_abandoned
from icmlora.io.text import human_size
from registry import files as fs

_NAME = re.compile(r"sha256-[0-9a-f]{64}")
_MEMORY = Path("/dev/shm")  # noqa: S108  # in-memory file system; the folder below it is private
_SHARE = 0.5
"""Default size limit of the folders, as a share of the free space at the start."""
_PATIENCE = 5.0  # seconds to wait for the shared lock


def default_root(purpose: str) -> Path:
    """Return a private folder for a purpose such as "vllm", on an in-memory file system if available."""
    return _own_parent() / purpose


def _own_parent() -> Path:
    in_memory = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)
    return (_MEMORY if in_memory else Path(tempfile.gettempdir())) / f"icm-{os.getuid()}"


def is_adapter_folder(path: Path) -> bool:
    """Return whether a folder has icm's name format for served adapters."""
    return _NAME.fullmatch(path.name) is not None


class AdapterFolders:
    """The adapter folders of one process. Thread-safe.

    Args:
        root: The parent folder; created if missing, accessible only to this user.
        limit: Size limit in bytes; half of the free space by default.
        alone: Lock other processes out, so that `discard` may delete. Existing folders are left to the caller, because
            an engine may still use them. Otherwise processes share the folders, and the least recently used ones are
            deleted now.

    Raises:
        FoldersInUse: Another process has them, and one of the two needs exclusive access.
        FoldersUnusable: The folder belongs to another user, or is a link.
    """

    def __init__(self, root: Path, limit: int | None = None, *, alone: bool = False) -> None:
        self.root = root
        self.alone = alone
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        _make_private(root)
        self._lock = fs.open_file(root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            is_alone = fs.lock(self._lock, "alone")
            if alone and not is_alone:
                raise _in_use(root)
            remove_all_abandoned(root)
            self.limit = int(shutil.disk_usage(root).free * _SHARE) if limit is None else limit
            if not alone:
                if is_alone:
                    self._trim()
                # A process that starts at the same moment briefly holds the lock exclusively.
                until = time.monotonic() + _PATIENCE
                while not fs.lock(self._lock, "shared"):
                    if time.monotonic() > until:
                        raise _in_use(root)
                    time.sleep(0.05)
        except BaseException:
            os.close(self._lock)
            raise
        self._sizes = {folder.name: _size(folder) for folder in self._folders()}

    def get(self, key: str, write: Callable[[Path], None]) -> Path:
        """Return the folder of a key; if it is missing, call `write` once, even for concurrent calls.

        Raises:
            FoldersUnusable: The size limit is reached.
        """
        folder = self.path(key)
        with self._one(key):
            if folder.is_dir():
                folder.touch()  # mark as recently used
            else:
                if self.size >= self.limit:
                    used, limit = human_size(self.size), human_size(self.limit)
                    fact = f"the written adapters take {used}, but the limit is {limit}"
                    hint = "raise the limit, or restart the server to clear the folder"
                    raise FoldersUnusable(fact, path=self.root, hint=hint)
                try:
                    write(folder)
                except OutputExists:  # another process was faster
                    if not folder.is_dir():
                        raise
            self._sizes.setdefault(folder.name, _size(folder))
        return folder

    def path(self, key: str) -> Path:
        """Return the path for the folder of a key, which may not exist."""
        return self.root / f"sha256-{key}"

    def discard(self, key: str) -> None:
        """Delete an unused folder. Only for a process with exclusive access."""
        assert self.alone
        with self._one(key):
            shutil.rmtree(self.path(key), ignore_errors=True)
            self._sizes.pop(f"sha256-{key}", None)

    def keys(self) -> list[str]:
        """Return the keys of the existing folders."""
        return [name.removeprefix("sha256-") for name in list(self._sizes)]

    def size_of(self, key: str) -> int:
        """Return the size of a folder in bytes; 0 if it does not exist."""
        return self._sizes.get(f"sha256-{key}", 0)

    @property
    def size(self) -> int:
        """Total bytes of the folders known to this process."""
        return sum(list(self._sizes.values()))

    def close(self) -> None:
        """Release the lock; the folders stay for the next process."""
        os.close(self._lock)

    def _trim(self) -> None:
        """Delete the least recently used folders until half of the limit is free."""
        folders = sorted(self._folders(), key=lambda folder: folder.stat().st_mtime_ns)
        total = sum(map(_size, folders))
        for folder in folders:
            if total <= self.limit // 2:
                return
            total -= _size(folder)
            shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return [entry for entry in self.root.iterdir() if _NAME.fullmatch(entry.name)]

    @contextmanager
    def _one(self, key: str) -> Iterator[None]:
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            yield


def _make_private(root: Path) -> None:
    """Create a private folder; raise `FoldersUnusable` if another user created it, as is possible in shared memory."""
    root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The owner of the default parent folder could replace its subfolders, so check it too.
    for place in [*([root.parent] if root.parent == _own_parent() else []), root]:
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            hint = "choose another folder for the adapters"
            raise FoldersUnusable("is not a folder owned by this user", path=place, hint=hint)
        place.chmod(0o700)


def _in_use(root: Path) -> FoldersInUse:
    return FoldersInUse("another server uses this folder", path=root, hint="stop that server, or choose another folder")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
