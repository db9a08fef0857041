"""Content addressing on any backend: writes name bytes by their SHA-256, and reads verify them.

    plain file ──read once──▶ inspect ─▶ hash ─▶ backend        several files at a time, one batch

A file from outside is read once, so the same memory is checked, hashed and stored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from registry.errors import DamagedBlob, DamagedStore, MissingBlob, SourceRefused, StoreIOError
from registry.files import Bytes, CheckFirst, read_plain, store_errors

if TYPE_CHECKING:
    from registry.storage.blobs.backend import BlobBackend, BlobBatch, BlobInfo, Leftover
    from registry.storage.blobs.cache import BlobCache

T = TypeVar("T")
Item = TypeVar("Item")

# More threads than cores: while some wait for the disk to sync, others read and hash.
_WORKERS = 12
_RESTORING = {
    "blob": (
        "ingest the original again to restore its files; to restore a generator, run `icm import` with its bundle, or "
        "`icm train --fresh` if the originals are available"
    ),
    "manifest": "restore the file from a copy of the store",
}


def digest_of(data: Bytes) -> str:
    """Return the name of bytes in every store."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class PutResult(Generic[T]):
    """A stored file."""

    path: Path  # where it was read
    digest: str
    size: int
    is_new: bool  # False if the store, or an equal file of the batch, had its bytes
    inspected: T  # the result of the caller's `inspect`


@dataclass(frozen=True)
class PutRefusal:
    """A refused file; nothing of it was stored."""

    path: Path
    error: Exception


class Blobs:
    """Immutable bytes, named by their SHA-256."""

    def __init__(
        self,
        backend: BlobBackend,
        must_write: Callable[[], None] = lambda: None,
        cache: BlobCache | None = None,
        what: Literal["blob", "manifest"] = "blob",
    ) -> None:
        """Use a backend; reads go through the cache, checks bypass it. Messages call a file `what`."""
        self._backend, self._must_write, self._cache, self._what = backend, must_write, cache, what
        self._attempts = 2 if backend.is_remote else 1  # before a blob counts as damaged: the network may be at fault

    def put(self, data: Bytes) -> str:
        """Store bytes durably and return their digest; a manifest may then refer to it."""
        return self.put_all([data])[0]

    def put_all(self, items: Sequence[Bytes]) -> list[str]:
        """Store byte strings durably, in one batch, and return their digests in order."""
        self._must_write()
        named = [(digest_of(data), data) for data in items]
        with self._backend.batch() as batch:
            # Equal bytes once: two threads must not write one blob.
            _on_threads(lambda item: batch.put(*item), list(dict(named).items()))
        return [digest for digest, _ in named]

    def put_files(
        self,
        files: Sequence[Path],
        inspect: Callable[[Path, bytes], T],
        refusals: tuple[type[Exception], ...] = (),
        contents: Sequence[bytes] = (),
        withheld: Mapping[Path, Collection[str]] = MappingProxyType({}),
        first: Mapping[Path, CheckFirst] = MappingProxyType({}),
    ) -> list[PutResult[T] | PutRefusal]:
        """Store plain files durably, several at a time; return a result or a refusal for each, in order.

        Pass a few hundred megabytes at once: a batch counts only once all of it is durable, and a file is held in
        memory while it is written.

        Args:
            files: plain files; no links are followed.
            inspect: called on worker threads with a path and the bytes to be hashed and stored; raises to refuse them.
            refusals: exceptions that `inspect` raises to refuse one file. Any other exception ends the batch.
            contents: bytes in memory, to be stored in the same batch.
            withheld: file -> digests under which it is inspected but not stored: weights that stay evicted.
            first: file -> check before it is read completely; raises as `inspect` does.
        """
        self._must_write()
        expected: tuple[type[Exception], ...] = (SourceRefused, *refusals)

        def put_file(batch: BlobBatch, path: Path) -> PutResult[T] | PutRefusal:
            try:
                data = read_plain(path, first=first.get(path))
                inspected = inspect(path, data)
            except expected as error:
                return PutRefusal(path, error)
            # Inspect, hash and store the same bytes: the file may change at any time.
            digest = digest_of(data)
            is_new = digest not in withheld.get(path, ()) and batch.put(digest, data)
            return PutResult(path, digest, len(data), is_new, inspected)

        with self._backend.batch() as batch:
            # A fleet repeats its small files many times.
            _on_threads(lambda data: batch.put(digest_of(data), data), list(dict.fromkeys(contents)))
            return _on_threads(lambda path: put_file(batch, path), files)

    def read(self, digest: str) -> bytes:
        """Return a blob's verified bytes."""
        known = None if self._cache is None else self._cache.get(digest)
        if known is not None:
            return known
        for _ in range(self._attempts):
            with self._errors(digest), self._backend.get(digest) as file:
                data = file.read()
            if digest_of(data) == digest:
                if self._cache is not None:
                    self._cache.put(digest, data)
                return data
        raise self._damaged(digest)

    def is_at_hand(self, digest: str) -> bool:
        """Return whether a blob can be read without a network."""
        return not self.is_remote or (self._cache is not None and self._cache.start(digest, 1) is not None)

    def fetch(self, digests: Iterable[str]) -> None:
        """Prefetch remote blobs into the cache, several at a time.

        Damage is left for `read` to report.
        """
        if self.is_remote and self._cache is not None:
            cache = self._cache
            _on_threads(self._read_ahead, [digest for digest in sorted(set(digests)) if cache.start(digest, 1) is None])

    def _read_ahead(self, digest: str) -> None:
        with suppress(DamagedStore):
            self.read(digest)

    def start(self, digest: str, size: int) -> bytes:
        """Return the first bytes of a blob, unverified."""
        known = None if self._cache is None else self._cache.start(digest, size)
        if known is not None:
            return known
        with self._errors(digest), self._backend.get(digest) as file:
            return file.read(size)

    def check(self, digest: str) -> None:
        """Raise if a blob is missing or damaged, without holding it in memory."""
        if not self.is_intact(digest):
            raise self._damaged(digest)

    def is_intact(self, digest: str) -> bool:
        """Return whether a blob's bytes match its digest, without holding them in memory."""
        for _ in range(self._attempts):
            with self._errors(digest), self._backend.get(digest) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == digest:  # type: ignore[arg-type]
                    return True
        return False

    def exists(self, digest: str) -> bool:
        """Return whether the store has a blob."""
        return self._backend.exists(digest)

    def size(self, digest: str) -> int:
        """Return a blob's length in bytes."""
        with self._errors(digest):
            return self._backend.size(digest)

    def all(self) -> Iterator[BlobInfo]:
        """Yield all blobs, by digest, referenced or not; raise if the listing is incomplete."""
        return self._backend.all()

    def sizes(self) -> dict[str, int]:
        """Return digest -> length in bytes of all blobs."""
        return {blob.digest: blob.size for blob in self._backend.all()}

    @property
    def is_remote(self) -> bool:
        """Whether each call waits for a network."""
        return self._backend.is_remote

    @property
    def home(self) -> str:
        """The location of all blobs, for messages."""
        return self._backend.home

    @property
    def grace(self) -> float:
        """Default minimum age, in seconds, of files that `icm prune` deletes."""
        return self._backend.grace

    def now(self) -> float:
        """Return the time by the clock of the blobs' file times."""
        return self._backend.now()

    def delete(self, digests: Iterable[str], *, newest: float | None = None) -> int:
        """Delete blobs and return the bytes freed; skip missing ones.

        Also skip blobs written after `newest`; by default, remote blobs within the grace.
        """
        if newest is None:
            newest = self.now() - self.grace if self.is_remote else math.inf
        return sum(self._each(partial(self._backend.delete, newest=newest), list(digests)))

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield leftovers of killed writers, or with `aside`, the blobs in quarantine."""
        return self._backend.leftovers(aside=aside)

    def quarantine(self, digest: str) -> str:
        """Move a damaged blob to quarantine; return its new location."""
        return self._backend.quarantine(digest)

    def place(self, digest: str) -> str:
        """Return the location of a blob, existing or not, for messages."""
        return self._backend.place(digest)

    def _each(self, call: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
        """Return the result of `call` for each item, in order; remote calls run several at a time."""
        return _on_threads(call, items) if self.is_remote else list(map(call, items))

    @contextmanager
    def _errors(self, digest: str) -> Iterator[None]:
        """Convert an OSError of the block to an error of the store about a blob."""
        place = self._backend.place(digest)
        try:
            with store_errors(place):
                yield
        except StoreIOError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            hint = f"run `icm verify` to see what needs it; {_RESTORING[self._what]}"
            raise MissingBlob(f"{self._what} {digest} is missing", path=place, hint=hint) from None

    def _damaged(self, digest: str) -> DamagedBlob:
        hint = f"run `icm verify --repair` to repair it or move it aside; {_RESTORING[self._what]}"
        return DamagedBlob(f"{self._what} {digest} is damaged", path=self._backend.place(digest), hint=hint)


def _on_threads(call: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
    """Return the result of `call` for each item, in order; after an error, start no further call."""
    if len(items) < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(_WORKERS, len(items))) as pool:
        running = [pool.submit(call, item) for item in items]
        try:
            return [future.result() for future in running]
        except BaseException:  # KeyboardInterrupt too
            pool.shutdown(cancel_futures=True)
            raise
