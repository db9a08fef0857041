"""Content-addressed files: each is named by the SHA-256 of its bytes, written once and never changed.

    bytes ──▶ tmp/XXXX ──fsync──▶ rename ──▶ blobs/3/3f9a... ──fsync folder──▶ durable
                                                                    (a row may now refer to it)

A crash at any point leaves at most a file in tmp/ or a blob without a row; both are removed by prune.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from uuid import uuid4

from registry import fs
from registry.errors import DamagedBlob, MissingBlob
from registry.paths import StorePaths, is_digest
from registry.threads import Syncer, each_synced, sync_folders

_CHUNK = 1 << 20
_MODE = 0o444  # immutable, and it shows
_RESTORING = (
    "ingesting an original again restores its files; for a generator there is `icm import` of a bundle, or "
    "`icm train --fresh` where the originals are there"
)

Spare = Callable[[str], fs.Bytes | None]
"""Gives the bytes of a digest, as far as somebody holds them."""


def no_spare(digest: str) -> None:
    """Be the :data:`Spare` of who holds nothing."""


def digest_of(data: fs.Bytes) -> str:
    """Return the name that bytes have in every store."""
    return hashlib.sha256(data).hexdigest()


class BlobStore:
    """The blobs of one store."""

    def __init__(self, paths: StorePaths) -> None:
        self._paths = paths

    def stage(self, digest: str, data: fs.Bytes, syncer: Syncer) -> Path | None:
        """Write bytes to a temporary file, unless the store has exactly these bytes already.

        The present file is compared, not trusted, so that storing a file again heals a damaged blob.

        Returns:
            The temporary file, to be given to :meth:`publish` once the syncer is done, or None.
        """
        if self._holds(digest, data):
            return None
        path = self._paths.tmp / uuid4().hex
        syncer.sync(fs.write_unsynced(path, data, _MODE), path)
        return path

    def publish(self, staged: dict[str, Path | None]) -> None:
        """Give temporary files their names and make the names durable.

        Args:
            staged: digest -> temporary file, or None where the blob exists. Such a blob's folder is synced too: the
                process that wrote it may have been killed before it did.
        """
        folders = {self._paths.blob(digest).parent for digest in staged}
        for folder in sorted(folders):
            fs.make_dir(folder)
        for digest, temporary in staged.items():
            if temporary is not None:
                fs.replace(temporary, self._paths.blob(digest))
                fs.failpoint("blob-renamed")
        sync_folders([self._paths.blobs, *sorted(folders)])
        fs.failpoint("blobs-durable")

    def put(self, items: Iterable[fs.Bytes]) -> list[str]:
        """Store byte strings durably and return their digests, in order."""
        named = [(digest_of(data), data) for data in items]
        unique = dict(named)
        with fs.store_errors(self._paths.blobs):
            staged = each_synced(lambda digest, syncer: self.stage(digest, unique[digest], syncer), unique, _discard)
            self.publish(dict(zip(unique, staged, strict=True)))
        return [digest for digest, _ in named]

    def exists(self, digest: str) -> bool:
        """Say whether there is a file of that name."""
        return self._paths.blob(digest).exists()

    def size(self, digest: str) -> int:
        """Return a blob's length in bytes, from the file.

        Raises:
            MissingBlob: there is no such file.
        """
        try:
            return self._paths.blob(digest).stat().st_size
        except FileNotFoundError:
            raise self._missing(digest) from None

    def read(self, digest: str) -> bytes:
        """Return a blob's bytes once they are known to be the right ones.

        Raises:
            MissingBlob: there is no such file.
            DamagedBlob: its bytes have another digest.
        """
        path = self._paths.blob(digest)
        with fs.store_errors(path):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                raise self._missing(digest) from None
        if digest_of(data) != digest:
            raise self._damaged(digest)
        return data

    def check(self, digest: str) -> None:
        """Raise unless a blob's bytes are there and are the right ones; they are not held in memory.

        Raises:
            MissingBlob: there is no such file.
            DamagedBlob: its bytes have another digest.
        """
        self.size(digest)
        if not self.is_intact(digest):
            raise self._damaged(digest)

    def is_intact(self, digest: str) -> bool:
        """Say whether a blob's bytes have its digest, without holding them all in memory."""
        path = self._paths.blob(digest)
        with fs.store_errors(path), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest

    def digests(self) -> Iterator[str]:
        """Yield the digest of every blob file, in order."""
        for folder in sorted(self._paths.blobs.iterdir()):
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if is_digest(path.name) and path.parent.name == path.name[0]:
                    yield path.name

    def unlink(self, digests: Iterable[str]) -> int:
        """Remove blobs and return the bytes that this freed."""
        freed = 0
        with fs.store_errors(self._paths.blobs):
            for digest in digests:
                path = self._paths.blob(digest)
                if self.exists(digest):
                    freed += path.stat().st_size
                    fs.unlink(path)
                    fs.failpoint("blob-unlinked")
        return freed

    def set_aside(self, digest: str) -> Path:
        """Move a damaged blob to quarantine and return where it is now."""
        source = self._paths.blob(digest)
        target = self._paths.quarantine / f"{digest}.{uuid4().hex[:8]}"
        with fs.store_errors(source):
            fs.replace(source, target)
            fs.fsync_dir(self._paths.quarantine)
            fs.fsync_dir(source.parent)
        return target

    def _holds(self, digest: str, data: fs.Bytes) -> bool:
        try:
            with self._paths.blob(digest).open("rb") as file:
                if os.fstat(file.fileno()).st_size != len(data):
                    return False
                view = memoryview(data)
                # bytes compare with memcmp, memoryviews item by item
                return all(file.read(_CHUNK) == bytes(view[at : at + _CHUNK]) for at in range(0, len(data), _CHUNK))
        except FileNotFoundError:
            return False

    def _damaged(self, digest: str) -> DamagedBlob:
        hint = f"`icm verify --repair` moves it aside; {_RESTORING}"
        return DamagedBlob(f"blob {digest} is damaged", path=self._paths.blob(digest), hint=hint)

    def _missing(self, digest: str) -> MissingBlob:
        hint = f"`icm verify` says what needs it; {_RESTORING}"
        return MissingBlob(f"blob {digest} is missing", path=self._paths.blob(digest), hint=hint)


def _discard(temporary: Path | None) -> None:
    if temporary is not None:
        fs.discard(temporary)
