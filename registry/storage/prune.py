"""What may be deleted, and deleting it: rows first, bytes after.

A file is deleted only under the exclusive store lock, so no other process is between storing bytes and recording the
row that refers to them, and none is about to read the file of a row that it has seen.

There are two questions. Does any row *refer* to a blob? Then its row stays. Does any row *need* its bytes? Then its
file stays. Evicted adapters, and the texts of evaluations, are referred to and not needed.

In a remote place an eviction deletes nothing that is young, so it is prune that does, once the grace is over: weights
that only evicted adapters refer to go if all bytes that replace them are there and right, which is looked at just
before. In a folder an eviction deletes them itself; what a killed one leaves is set aside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cache, partial

from sqlalchemy import ColumnElement, Select, and_, delete, exists, or_, select
from sqlalchemy.orm import InstrumentedAttribute

from registry.errors import MissingBlob
from registry.files import failpoint
from registry.schema import Adapter, Base, Blob, Code, Document, Evaluation, Generator, TaskVector
from registry.storage.blobs.backend import Leftover
from registry.storage.blobs.content import Blobs
from registry.storage.database import Database
from registry.storage.folder import Upkeep
from registry.storage.locks import StoreLock
from registry.storage.row_writer import in_parts, table_of

BlobColumn = InstrumentedAttribute[int] | InstrumentedAttribute[int | None]
# Every column that refers to a blob.
BLOB_COLUMNS: tuple[BlobColumn, ...] = tuple(
    getattr(owner, column.name)
    for owner in Base.__subclasses__()
    for column in table_of(owner).columns
    if column.references(table_of(Blob).c.id)
)
_START = 64  # bytes of a blob by which its kind is known
_CHUNK = 200  # rows deleted per commit, so that the journal stays small on a full disk


@dataclass(frozen=True)
class PruneReport:
    """What prune removed, or would remove."""

    blobs: int  # that no row refers to
    temporary_files: int  # left by killed writers, and what quarantine held if that was asked for
    freed_bytes: int
    set_aside: int = 0  # further blobs, moved to quarantine: nobody could make them again
    set_aside_bytes: int = 0
    young: int = 0  # blobs that stay for now: a running command may be about to refer to them
    young_bytes: int = 0
    folders: tuple[str, ...] = ()  # found among the temporary files or in quarantine; they stay


def drop_evicted(database: Database, blobs: Blobs, digests: Sequence[str]) -> int:
    """Delete the files of these blobs unless a row needs their bytes, and return the bytes freed; the rows stay."""
    database.must_be_sound()
    needed: set[str] = set()  # cannot grow meanwhile: the caller holds the exclusive lock
    with database.read() as session:
        for some in in_parts(digests):
            needed |= set(session.scalars(select(Blob.digest).where(Blob.digest.in_(some), is_needed())))
    return blobs.delete(digest for digest in digests if digest not in needed)


def evicted_files(database: Database, blobs: Blobs) -> list[str]:
    """Return the digests of files that only evicted adapters refer to: what a killed `evict` left."""
    database.must_be_sound()
    with database.read() as session:
        query = select(Blob.digest).where(blob_references(Adapter, needed=False), ~is_needed()).order_by(Blob.digest)
        digests = session.scalars(query).all()
    return [digest for digest in digests if blobs.exists(digest)]


def drop_unreferenced(lock: StoreLock, database: Database, blobs: Blobs, digests: Iterable[str]) -> None:
    """Delete the files of these blobs, and those of earlier calls that could not, unless a row refers to them."""
    blobs.unwanted.update(digests)
    if not blobs.unwanted:
        return
    with lock.try_exclusive() as is_alone:
        if not is_alone or not database.is_sound():  # the files stay for the next call, or for prune
            return
        kept: set[str] = set()
        with database.write() as session:
            for some in in_parts(sorted(blobs.unwanted)):
                session.execute(delete(Blob).where(Blob.digest.in_(some), ~is_referenced()))
                kept |= set(session.scalars(select(Blob.digest).where(Blob.digest.in_(some))))
        failpoint("garbage-rows-gone")
        blobs.delete(sorted(blobs.unwanted - kept))
        blobs.unwanted.clear()


def prune(
    database: Database,
    blobs: Blobs,
    upkeep: Upkeep,
    *,
    grace: float | None = None,
    is_precious: Callable[[bytes], bool] = lambda start: False,
    empty_quarantine: bool = False,
    dry_run: bool = False,
) -> PruneReport:
    """Remove what no row refers to, or only say what would go; files younger than `grace` seconds stay.

    A blob that `is_precious`, by its first bytes, is moved to quarantine instead, unless that is to be emptied as well,
    or it is the original of an evicted adapter in a remote place.
    """
    database.must_be_sound()
    # Young files may be another writer's, where locks do not lock.
    newest = blobs.now() - (blobs.grace if grace is None else grace)
    with database.read() as session:
        needed = set(session.scalars(select(Blob.digest).where(is_needed())))
    unneeded = [blob for blob in blobs.all() if blob.digest not in needed]
    doomed = {blob.digest: blob.size for blob in unneeded if blob.modified <= newest}
    young = [blob.size for blob in unneeded if blob.modified > newest]
    left, precious = leftovers(blobs, upkeep), set[str]()
    if empty_quarantine:
        left += leftovers(blobs, upkeep, aside=True)
    else:
        replaced = _replaced(database, blobs, doomed.keys()) if blobs.is_remote else set()
        precious = {digest for digest in doomed if digest not in replaced and is_precious(_start_of(blobs, digest))}
    temporary = [file for file in left if file.modified <= newest and not file.is_folder]
    if not dry_run:
        if doomed:
            upkeep.before_deletion()
        _delete_rows(database)
        failpoint("garbage-rows-gone")
        for digest in sorted(precious):
            blobs.quarantine(digest)
        blobs.delete((digest for digest in doomed if digest not in precious), newest=newest)
        for file in temporary:
            file.remove()
    aside = sum(doomed[digest] for digest in precious)
    freed = sum(doomed.values()) + sum(file.size for file in temporary) - aside
    folders = tuple(file.place for file in left if file.is_folder)
    return PruneReport(
        len(doomed) - len(precious), len(temporary), freed, len(precious), aside, len(young), sum(young), folders
    )


def _replaced(database: Database, blobs: Blobs, doomed: Set[str]) -> set[str]:
    """Return which of these weights only evicted adapters refer to, with codes that are measured and intact."""
    parts = defaultdict[str, set[str]](set)  # of weights: what replaces them
    refused = set[str]()
    with database.read() as session:
        for some in in_parts(sorted(doomed)):
            for adapter, code, generator in session.execute(_evicted(some)):
                weights = {blob.digest for blob in (adapter.weights, adapter.initial) if blob is not None} & doomed
                if code is None or (code.squared_error is None and code.residual_squared_error is None):
                    refused |= weights  # a bundle may have brought it: nobody has checked it
                    continue
                kept = [adapter.config, code.blob, code.residual, generator.blob]
                kept += [extra.blob for extra in adapter.extras]
                for digest in weights:
                    parts[digest].update(blob.digest for blob in kept if blob is not None)
    is_intact = cache(partial(_is_intact, blobs))
    return {weights for weights, needed in parts.items() if weights not in refused and all(map(is_intact, needed))}


def _evicted(weights: Sequence[str]) -> Select[Adapter, Code | None, Generator]:
    """Select the evicted adapters of some weights, with the codes of their tasks, or with None."""
    ids, current = select(Blob.id).where(Blob.digest.in_(weights)), select(Generator.id).where(Generator.is_current)
    found = select(Adapter, Code, Generator).select_from(Adapter)
    found = found.outerjoin(Code, and_(Code.task_id == Adapter.task_id, Code.generator_id.in_(current)))
    found = found.outerjoin(Generator, Code.generator_id == Generator.id).where(Adapter.evicted_at.is_not(None))
    return found.where(or_(Adapter.weights_id.in_(ids), Adapter.initial_id.in_(ids)))


def _is_intact(blobs: Blobs, digest: str) -> bool:
    try:
        return blobs.is_intact(digest)
    except MissingBlob:
        return False


def leftovers(blobs: Blobs, upkeep: Upkeep, *, aside: bool = False) -> list[Leftover]:
    """Return what killed commands left in a store and among its blobs; `aside`, what is in quarantine."""
    found = (*upkeep.leftovers(aside=aside), *blobs.leftovers(aside=aside))  # mostly of the same folder
    return list({file.place: file for file in found}.values())


def _start_of(blobs: Blobs, digest: str) -> bytes:
    try:
        return blobs.start(digest, _START)
    except MissingBlob:  # during a dry run, another process removed it
        return b""


def is_referenced() -> ColumnElement[bool]:
    """Return the condition that any row refers to a blob."""
    return or_(*(_is_in(column) for column in BLOB_COLUMNS))


def is_needed() -> ColumnElement[bool]:
    """Return the condition that any row needs the bytes of a blob."""
    # Held-out text is known by its digest; a measurement stays true without it.
    return or_(*(_is_in(column, needed=True) for column in BLOB_COLUMNS if column is not Evaluation.data_id))


def blob_references(
    owner: type[Base], condition: ColumnElement[bool] | None = None, *, needed: bool = True
) -> ColumnElement[bool]:
    """Return the condition that (some of) the rows of one table need a blob's bytes, or else only refer to it."""
    columns = [column for column in BLOB_COLUMNS if column.class_ is owner]
    return or_(*(_is_in(column, condition, needed=needed) for column in columns))


def _is_in(
    column: BlobColumn, condition: ColumnElement[bool] | None = None, *, needed: bool = False
) -> ColumnElement[bool]:
    # A list of numbers that is made once: to look for each blob among all rows takes the square of their number.
    numbers = select(column).where(column.is_not(None))
    if condition is not None:
        numbers = numbers.where(condition)
    # The row of evicted weights stays, so that the original is recognised when it comes back.
    if needed and is_evictable(column):
        numbers = numbers.where(Adapter.evicted_at.is_(None))
    return Blob.id.in_(numbers)


def is_evictable(column: BlobColumn) -> bool:
    """Say whether an evicted adapter does not need what this column refers to."""
    return column is Adapter.weights_id or column is Adapter.initial_id


def _delete_rows(database: Database) -> None:
    """Delete the rows that nothing refers to, a few per commit."""
    stale = select(Blob.id).where(~is_referenced()).limit(_CHUNK)
    while True:
        with database.write() as session:
            ids = session.scalars(stale).all()
            session.execute(delete(Blob).where(Blob.id.in_(ids)))
            if not ids:
                columns = (Adapter.description_id, TaskVector.extractor_id, Evaluation.settings_id)
                is_read = or_(*(exists().where(column == Document.id) for column in columns))
                session.execute(delete(Document).where(~is_read))
                return
