"""What may be deleted, and deleting it: rows first, bytes after.

A file goes only while the write lock is held and no row refers to it; a row comes only while the write lock is held
and its file is there (see :meth:`registry.writer.RowWriter.blob`). So no order of two processes leaves a row without
its bytes.

Two questions: is there a row that *refers* to a blob (then its row stays), and is there one that *needs* its bytes
(then its file stays)? Evicted adapters, and the texts of evaluations, are referred to and not needed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import ColumnElement, and_, delete, exists, or_, select
from sqlalchemy.orm import InstrumentedAttribute

from registry import files as fs
from registry.blobs.local import BlobStore
from registry.database import Database
from registry.files import failpoint
from registry.folder import StorePaths
from registry.rows import in_parts
from registry.schema import Adapter, Base, Blob, Code, Document, Evaluation, Generator, Task, TaskVector, TrainRun

# Every column that refers to a blob; a test compares this with the tables.
BLOB_COLUMNS: tuple[InstrumentedAttribute[int] | InstrumentedAttribute[int | None], ...] = (
    Task.samples_id,
    Task.eval_id,
    Adapter.weights_id,
    Adapter.config_id,
    Adapter.card_id,
    TaskVector.blob_id,
    Generator.blob_id,
    Generator.start_id,
    TrainRun.weights_id,
    TrainRun.optimizer_id,
    Code.blob_id,
    Code.residual_id,
    Evaluation.data_id,
)
_CHUNK = 200  # rows deleted per commit, so that the journal stays small on a full disk


@dataclass(frozen=True)
class PruneReport:
    """What prune removed, or would remove.

    Attributes:
        blobs: blobs that no row refers to.
        temporary_files: leftovers of killed writers.
        freed_bytes: the length of both together.
    """

    blobs: int
    temporary_files: int
    freed_bytes: int


def drop_evicted(database: Database, blobs: BlobStore, digests: Sequence[str]) -> int:
    """Remove the files of these blobs unless a row needs their bytes, and return the bytes freed; their rows stay."""
    with database.write() as session:
        wanted: set[str] = set()
        for some in in_parts(digests):
            wanted |= set(session.scalars(select(Blob.digest).where(Blob.digest.in_(some), is_needed())))
        return blobs.unlink(digest for digest in digests if digest not in wanted)


def evicted_files(database: Database, blobs: BlobStore) -> list[str]:
    """Return the digests of files that only evicted adapters refer to: what a killed `evict` left."""
    with database.read() as session:
        query = select(Blob.digest).where(blob_references(Adapter, needed=False), ~is_needed()).order_by(Blob.digest)
        digests = session.scalars(query).all()
    return [digest for digest in digests if blobs.exists(digest)]


def drop_unreferenced(database: Database, blobs: BlobStore, digests: Sequence[str]) -> int:
    """Remove these blobs if no row refers to them, and return the bytes freed."""
    if not digests:
        return 0
    with database.write() as session:
        session.execute(delete(Blob).where(Blob.digest.in_(digests), ~is_referenced()))
        kept = set(session.scalars(select(Blob.digest).where(Blob.digest.in_(digests))))
    failpoint("garbage-rows-gone")
    with database.write() as session:
        kept |= set(session.scalars(select(Blob.digest).where(Blob.digest.in_(digests))))
        return blobs.unlink(digest for digest in digests if digest not in kept)


def prune(
    database: Database, blobs: BlobStore, paths: StorePaths, *, grace: float, dry_run: bool = False
) -> PruneReport:
    """Remove what no row refers to, or only say what would go.

    The caller holds the exclusive lock, so nobody is between blob and row. Files younger than `grace` seconds stay
    nevertheless, for file systems whose locks do not lock.
    """
    doomed = _older(map(paths.blob, _garbage(database, blobs)), grace)
    temporary = _older(sorted(paths.tmp.iterdir()), grace)
    if not dry_run:
        _delete_rows(database)
        failpoint("garbage-rows-gone")
        blobs.unlink(path.name for path in doomed)
        with fs.store_errors(paths.tmp):
            for path in temporary:
                fs.unlink(path)
    return PruneReport(len(doomed), len(temporary), sum(doomed.values()) + sum(temporary.values()))


def is_referenced() -> ColumnElement[bool]:
    """Return the condition that any row refers to a blob."""
    return or_(*(exists().where(column == Blob.id) for column in BLOB_COLUMNS))


def is_needed() -> ColumnElement[bool]:
    """Return the condition that any row needs the bytes of a blob."""
    return or_(*(exists().where(_needs(column)) for column in BLOB_COLUMNS if column is not Evaluation.data_id))


def blob_references(
    owner: type[Base], condition: ColumnElement[bool] | None = None, *, needed: bool = True
) -> ColumnElement[bool]:
    """Return the condition that (some of) the rows of one table need a blob's bytes, or else only refer to it."""
    columns = [column for column in BLOB_COLUMNS if column.class_ is owner]
    refers = or_(*(_needs(column) if needed else column == Blob.id for column in columns))
    return exists().where(refers if condition is None else and_(refers, condition))


def _needs(column: InstrumentedAttribute[int] | InstrumentedAttribute[int | None]) -> ColumnElement[bool]:
    refers = column == Blob.id
    return and_(refers, Adapter.evicted_at.is_(None)) if column is Adapter.weights_id else refers


def _garbage(database: Database, blobs: BlobStore) -> Iterator[str]:
    with database.read() as session:
        wanted = set(session.scalars(select(Blob.digest).where(is_needed())))
    return (digest for digest in blobs.digests() if digest not in wanted)


def _delete_rows(database: Database) -> None:
    """Delete the rows that nothing refers to, a few per commit."""
    stale = select(Blob.id).where(~is_referenced()).limit(_CHUNK)
    while True:
        with database.write() as session:
            ids = session.scalars(stale).all()
            session.execute(delete(Blob).where(Blob.id.in_(ids)))
            if not ids:
                session.execute(delete(Document).where(~_has_document()))
                return


def _has_document() -> ColumnElement[bool]:
    return or_(
        exists().where(Adapter.description_id == Document.id),
        exists().where(TaskVector.extractor_id == Document.id),
        exists().where(Evaluation.settings_id == Document.id),
    )


def _older(paths: Iterable[Path], seconds: float) -> dict[Path, int]:
    """Return path -> length of the files that have been there for some time.

    A dry run has others beside it: what one of them has renamed or removed since the folder was listed is passed over.
    """
    found: dict[Path, int] = {}
    for path in paths:
        with suppress(FileNotFoundError):
            state = path.stat()
            if time.time() - state.st_mtime >= seconds:
                found[path] = state.st_size
    return found
