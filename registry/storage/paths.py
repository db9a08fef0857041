"""The paths of a store folder; docs/design.md explains each."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

from registry import files as fs
from registry.manifests import is_digest
from registry.storage.blobs.backend import Leftover

Namespace = Literal["blobs", "manifests"]


class StorePaths:
    """The paths of one store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.format = root / "FORMAT"
        self.place = root / "BLOBS"
        self.database = root / "registry.db"
        self.journal = root / "registry.db-journal"  # SQLite's own, of an unfinished commit
        self.blobs = root / "blobs"
        self.manifests = root / "manifests"
        self.tmp = root / "tmp"
        self.quarantine = root / "quarantine"
        self.lock = root / "lock"
        self.jobs = root / "jobs"
        self.reserve = root / "reserve"

    def job(self, base_model: str) -> Path:
        """Return the lock file of a base model's jobs."""
        return self.jobs / hashlib.sha256(base_model.encode()).hexdigest()[:16]

    def file(self, namespace: Namespace, digest: str) -> str:
        """Return the path of a blob or manifest, built only here; raise `ValueError` if this is not a digest."""
        if not is_digest(digest):
            raise ValueError(f"not a digest: {digest[:80]!r}")
        return f"{self.root}/{namespace}/{digest[0]}/{digest}"  # a `Path` takes longer than reading a manifest


def make_folders(paths: StorePaths) -> None:
    """Create the folders of a store; copies often lack empty ones."""
    with fs.store_errors(paths.root):
        for folder in (paths.blobs, paths.manifests, paths.tmp, paths.quarantine):
            fs.make_dir(folder)


def files_in(folder: Path) -> Iterator[Leftover]:
    """Yield the files and folders in a folder that should be empty."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # another process renamed or removed it
            status = path.stat()
            remove = partial(_remove, path)
            yield Leftover(str(path), status.st_size, status.st_mtime, remove, stat.S_ISDIR(status.st_mode))


def _remove(path: Path) -> None:
    with fs.store_errors(path):
        fs.unlink(path)
