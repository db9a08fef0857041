"""Take many files into the blob store at once, durably and fast.

Each file is read whole, hashed, inspected and written from the same memory, so check and copy cannot disagree; then
the next file is read into it. Syncs overlap with the reading and writing of other files; the renames and folder syncs
of the batch come last:

    read ─▶ inspect ─▶ hash ─▶ tmp file     a few more threads than cores, one file each
                                  └─▶ fsync     more threads: they only wait
                                        └─▶ all renames ─▶ one fsync per folder     once
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from registry import fs
from registry.blobs import BlobStore, digest_of
from registry.buffers import Buffers
from registry.errors import SourceRefused
from registry.paths import StorePaths
from registry.source import read_source, source_size
from registry.threads import Syncer, each_synced

T = TypeVar("T")

_BYTES_IN_FLIGHT = 256 << 20


@dataclass(frozen=True)
class PutResult(Generic[T]):
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
    inspected: T


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
class _Staged(Generic[T]):
    digest: str
    temporary: Path | None  # None where the store, or an equal member of the batch, has the bytes
    result: PutResult[T] | None  # None for bytes, which are no file


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
    inspect: Callable[[Path, memoryview], T],
    refusals: tuple[type[Exception], ...] = (),
    contents: Sequence[bytes] = (),
    withheld: Mapping[Path, Collection[str]] = MappingProxyType({}),
) -> list[PutResult[T] | PutRefusal]:
    """Store files durably; see :meth:`registry.store.Store.put_files`."""
    buffers, claims = Buffers(_BYTES_IN_FLIGHT), _Claims()
    expected: tuple[type[Exception], ...] = (SourceRefused, *refusals)

    def stage_bytes(data: fs.Bytes, syncer: Syncer, unwanted: Collection[str] = ()) -> tuple[str, Path | None]:
        digest = digest_of(data)
        if digest in unwanted:
            return digest, None
        with fs.store_errors(paths.tmp):
            return digest, blobs.stage(digest, data, syncer) if claims.claim(digest) else None

    def stage(item: Path | bytes, syncer: Syncer) -> _Staged[T] | PutRefusal:
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
    staged = each_synced(stage, items, undo=_discard)
    with fs.store_errors(paths.blobs):
        blobs.publish(_temporaries(item for item in staged if isinstance(item, _Staged)))
    results = (item.result if isinstance(item, _Staged) else item for item in staged)
    return [result for result in results if result is not None]


def _temporaries(staged: Iterable[_Staged[T]]) -> dict[str, Path | None]:
    """Return digest -> temporary file; of equal files at most one has a temporary file."""
    found: dict[str, Path | None] = {}
    for item in staged:
        found[item.digest] = item.temporary or found.get(item.digest)
    return found


def _discard(item: _Staged[Any] | PutRefusal) -> None:
    if isinstance(item, _Staged) and item.temporary is not None:
        fs.discard(item.temporary)
