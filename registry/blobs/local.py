"""Do the same thing to many files at once, or to none of them.

Memory that many files pass through, one after the other.

Fresh memory is dear: the kernel clears each page of it when it is first touched, which for a megabyte takes about as
long as hashing it. So what one file is done with is lent to the next.

Content-addressed files: each is named by the SHA-256 of its bytes, written once and never changed.

    bytes ──▶ tmp/XXXX ──fsync──▶ rename ──▶ blobs/3/3f9a... ──fsync folder──▶ durable
                                                                    (a row may now refer to it)

A crash at any point leaves at most a file in tmp/ or a blob without a row; both are removed by prune.

Take many files into the blob store at once, durably and fast.

Each file is read whole, hashed, inspected and written from the same memory, so check and copy cannot disagree; then
the next file is read into it. Syncs overlap with the reading and writing of other files; the renames and folder syncs
of the batch come last:

    read ─▶ inspect ─▶ hash ─▶ tmp file     a few more threads than cores, one file each
                                  └─▶ fsync     more threads: they only wait
                                        └─▶ all renames ─▶ one fsync per folder     once
"""

from __future__ import annotations

import hashlib
import mmap
import os
from bisect import insort
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Condition, Lock, Semaphore
from types import MappingProxyType
from typing import Any, Generic, TypeVar
from uuid import uuid4

from registry import files as fs
from registry.errors import DamagedBlob, MissingBlob, SourceRefused
from registry.files import read_source, source_size
from registry.folder import StorePaths, is_digest

T = TypeVar("T")
R = TypeVar("R")

# Reading and hashing keep a core busy while two more threads wait for the device; yet more get into each other's way.
_WORKERS = min(8, (os.cpu_count() or 1) + 2)
# Syncing waits for the device, which does many syncs at once as fast as one.
_SYNCERS = 12
_OPEN_FILES = 64


class Syncer:
    """Syncs written files in threads of its own, while others are still being written."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_SYNCERS)
        self._running: list[Future[None]] = []
        self._files: SimpleQueue[tuple[int, Path] | None] = SimpleQueue()
        self._room = Semaphore(_OPEN_FILES)

    def sync(self, fd: int, path: Path) -> None:
        """Begin to sync and close a file; wait while too many are open."""
        self._room.acquire()
        self._files.put((fd, path))
        if len(self._running) < _SYNCERS:
            self._running.append(self._threads.submit(self._sync_all))

    def wait(self) -> None:
        """Wait for all files; no more may be given.

        Raises:
            StoreFull: no space for one of them.
            StoreIOError: one could not be synced.
        """
        self.close()
        for thread in self._running:
            thread.result()

    def close(self) -> None:
        """Wait for all files, whatever became of them."""
        for _ in self._running:
            self._files.put(None)
        self._threads.shutdown()

    def _sync_all(self) -> None:
        failure: BaseException | None = None
        while (file := self._files.get()) is not None:
            try:
                self._sync(*file)
            except BaseException as error:  # it waits until the other files are closed
                failure = error
        if failure is not None:
            raise failure

    def _sync(self, fd: int, path: Path) -> None:
        try:
            with fs.store_errors(path.parent):
                fs.sync_and_close(fd)
            fs.failpoint("blob-staged")
        finally:
            self._room.release()


def each(
    call: Callable[[T], R], items: Iterable[T], undo: Callable[[R], object], *, threads: int = _WORKERS
) -> list[R]:
    """Return what `call` returns for each item, in order, having called it on several at a time.

    If a call raises, those that have not begun never begin, those that were done are undone, and its error goes on.
    """
    waiting, done = deque(enumerate(items)), dict[int, R]()

    def work() -> None:
        # One future for a thread: one for each item would cost more than many a call does.
        try:
            while (taken := _take(waiting)) is not None:
                done[taken[0]] = call(taken[1])
        except BaseException:
            waiting.clear()
            raise

    with ThreadPoolExecutor(threads) as pool:
        workers = [pool.submit(work) for _ in range(min(threads, len(waiting)))]
        try:
            for worker in workers:
                worker.result()
        except BaseException:
            waiting.clear()  # the error may be none of a call: the user wants to stop
            pool.shutdown()
            for result in done.values():
                undo(result)
            raise
    return [done[number] for number in sorted(done)]


def _take(waiting: deque[T]) -> T | None:
    """Take the next item, unless another thread took the last one."""
    try:
        return waiting.popleft()
    except IndexError:
        return None


def each_synced(call: Callable[[T, Syncer], R], items: Iterable[T], undo: Callable[[R], object]) -> list[R]:
    """Do what `each` does with calls that give files to a syncer; return once all of these are synced."""
    syncer = Syncer()
    try:
        results = each(lambda item: call(item, syncer), items, undo)
    except BaseException:
        syncer.close()
        raise
    try:
        syncer.wait()
    except BaseException:
        for result in results:
            undo(result)
        raise
    return results


def sync_folders(folders: Iterable[Path]) -> None:
    """Sync folders, many at a time; a sync cannot be undone and need not be."""
    each(fs.fsync_dir, folders, undo=lambda _: None, threads=_SYNCERS)


class Buffers:
    """Lends memory to several threads, within one bound for what is lent and what waits to be lent again.

    The system gets it back when the object and all views are gone.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lent = 0
        self._idle: list[mmap.mmap] = []  # by size
        self._changed = Condition()

    @contextmanager
    def lend(self, size: int) -> Iterator[memoryview]:
        """Lend `size` bytes that begin on a page, for the block; wait while other threads hold too many.

        What is in them is left from other files, and will be overwritten by others after the block. More than the
        whole bound is lent alone.
        """
        memory = self._take(size)
        try:
            yield memoryview(memory)[:size]
        finally:
            self._take_back(memory)

    def _take(self, size: int) -> mmap.mmap:
        wanted = max(1, size)  # nothing at all cannot be mapped
        with self._changed:
            self._changed.wait_for(lambda: not self._lent or self._lent + wanted <= self._limit)
            memory = self._idle.pop() if self._idle else None
            if memory is None or len(memory) < wanted:
                while self._idle and not self._has_room(wanted):
                    del self._idle[0]
                # Shared with nobody, but unlike private memory safe to write from while another thread forks.
                memory = mmap.mmap(-1, wanted)
            self._lent += len(memory)
        return memory

    def _take_back(self, memory: mmap.mmap) -> None:
        with self._changed:
            self._lent -= len(memory)
            if self._has_room(len(memory)):
                insort(self._idle, memory, key=len)
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        return self._lent + sum(map(len, self._idle)) + size <= self._limit


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


Inspected = TypeVar("Inspected")

_BYTES_IN_FLIGHT = 256 << 20


@dataclass(frozen=True)
class PutResult(Generic[Inspected]):
    """A file that is in the store now.

    Attributes:
        path: where it was read.
        digest: its SHA-256, by which rows refer to it.
        size: its length in bytes.
        is_new: its bytes were written now; False where the store, or an equal file of the batch, had them.
        inspected: what the caller's `inspect` returned for it.
    """

    path: Path
    digest: str
    size: int
    is_new: bool
    inspected: Inspected


@dataclass(frozen=True)
class PutRefusal:
    """A file that was refused; the store has nothing of it.

    Attributes:
        path: the file.
        error: why, from the store or from the caller's `inspect`.
    """

    path: Path
    error: Exception


@dataclass(frozen=True)
class _Staged(Generic[Inspected]):
    digest: str
    temporary: Path | None  # None where the store, or an equal member of the batch, has the bytes
    result: PutResult[Inspected] | None  # None for bytes, which are no file


class _Claims:
    """Lets one of several equal files of a batch be written."""

    def __init__(self) -> None:
        self._digests: set[str] = set()
        self._lock = Lock()

    def claim(self, digest: str) -> bool:
        """Say whether the caller is the first to ask for this digest."""
        with self._lock:
            is_first = digest not in self._digests
            self._digests.add(digest)
        return is_first


def put_files(
    blobs: BlobStore,
    paths: StorePaths,
    files: Sequence[Path],
    inspect: Callable[[Path, memoryview], Inspected],
    refusals: tuple[type[Exception], ...] = (),
    contents: Sequence[bytes] = (),
    withheld: Mapping[Path, Collection[str]] = MappingProxyType({}),
) -> list[PutResult[Inspected] | PutRefusal]:
    """Store files durably; see :meth:`registry.store.Store.put_files`."""
    buffers, claims = Buffers(_BYTES_IN_FLIGHT), _Claims()
    expected: tuple[type[Exception], ...] = (SourceRefused, *refusals)

    def stage_bytes(data: fs.Bytes, syncer: Syncer, unwanted: Collection[str] = ()) -> tuple[str, Path | None]:
        digest = digest_of(data)
        if digest in unwanted:
            return digest, None
        with fs.store_errors(paths.tmp):
            return digest, blobs.stage(digest, data, syncer) if claims.claim(digest) else None

    def stage(item: Path | bytes, syncer: Syncer) -> _Staged[Inspected] | PutRefusal:
        if isinstance(item, bytes):
            return _Staged(*stage_bytes(item, syncer), None)
        try:
            with buffers.lend(size := source_size(item)) as memory:
                data = read_source(item, memory)
                inspected = inspect(item, data)
                digest, temporary = stage_bytes(data, syncer, withheld.get(item, ()))
        except expected as error:
            return PutRefusal(item, error)
        return _Staged(digest, temporary, PutResult(item, digest, size, temporary is not None, inspected))

    items: list[Path | bytes] = [*dict.fromkeys(contents), *files]  # a fleet repeats its small files many times
    staged = each_synced(stage, items, undo=_discard_staged)
    with fs.store_errors(paths.blobs):
        blobs.publish(_temporaries(item for item in staged if isinstance(item, _Staged)))
    results = (item.result if isinstance(item, _Staged) else item for item in staged)
    return [result for result in results if result is not None]


def _temporaries(staged: Iterable[_Staged[Inspected]]) -> dict[str, Path | None]:
    """Return digest -> temporary file; of equal files at most one has a temporary file."""
    found: dict[str, Path | None] = {}
    for item in staged:
        found[item.digest] = item.temporary or found.get(item.digest)
    return found


def _discard_staged(item: _Staged[Any] | PutRefusal) -> None:
    if isinstance(item, _Staged) and item.temporary is not None:
        fs.discard(item.temporary)
