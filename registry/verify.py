"""Find what is wrong with a store, and move damaged bytes out of the way. Nothing is ever deleted here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from registry.errors import DamagedStore, MissingBlob, StoreIOError
from registry.schema import Adapter, Blob, Code, Extra, Generator, Task, TaskVector
from registry.storage.blobs.content import Blobs
from registry.storage.database import Damage, Database
from registry.storage.folder import Upkeep
from registry.storage.prune import BLOB_COLUMNS, BlobColumn, is_evictable, is_needed, leftovers
from registry.storage.row_writer import find_task
from registry.values import LEAST_SHARE, MOST_SHARE

Kind = Literal["database", "dangling", "row", "missing", "length", "digest", "orphan", "leftover", "remark"]

_HARMLESS = {"orphan", "leftover", "remark"}
# What is known twice: what is wrong with it -> the tasks of which it is.
_CONTRADICTIONS = {
    "the recorded length of the code of task {} differs from its file": """
SELECT name FROM codes JOIN tasks ON tasks.id = task_id JOIN blobs ON blobs.id = blob_id WHERE bits != 8.0 * size""",
    "the code of task {} belongs to a generator of another base model": """
SELECT name FROM codes JOIN tasks ON tasks.id = task_id JOIN generators ON generators.id = generator_id
WHERE tasks.base_model_id != generators.base_model_id""",
    "the code of task {} was made from an adapter of another task": """
SELECT name FROM codes JOIN tasks ON tasks.id = codes.task_id JOIN adapters ON adapters.id = adapter_id
WHERE adapters.task_id != codes.task_id""",
    "a code of task {} has a negative error, an impossible effect, or a residual without an error": f"""
SELECT name FROM codes JOIN tasks ON tasks.id = task_id
WHERE dw_error < 0 OR residual_error < 0 OR effect NOT BETWEEN {LEAST_SHARE} AND {MOST_SHARE}
    OR (residual_id IS NULL) != (residual_error IS NULL)""",  # noqa: S608
    "a measurement of task {} has an impossible gain": f"""
SELECT name FROM evaluations JOIN tasks ON tasks.id = task_id
WHERE retained_gain NOT BETWEEN {LEAST_SHARE} AND {MOST_SHARE} OR dw_error < 0""",  # noqa: S608
}
_GAPS = {
    "task {} has no final adapter": """
SELECT name FROM tasks LEFT JOIN adapters ON adapters.task_id = tasks.id AND is_final WHERE adapters.id IS NULL""",
    "task {} was evicted and has no code": """
SELECT name FROM tasks JOIN adapters ON adapters.task_id = tasks.id LEFT JOIN codes ON codes.adapter_id = adapters.id
WHERE is_final AND evicted_at IS NOT NULL AND codes.id IS NULL""",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    kind: Kind
    message: str
    path: str
    digest: str | None = None  # the blob it is about
    tasks: tuple[str, ...] = ()  # that need the blob

    @property
    def is_problem(self) -> bool:
        """False for what a crash may leave and prune removes, and for remarks on adapters that are kept as they are."""
        return self.kind not in _HARMLESS


def verify(
    database: Database, blobs: Blobs, upkeep: Upkeep, *, read_data: bool, names: Sequence[str] = ()
) -> Iterator[Finding]:
    """Check the database, then each blob's presence and length, then (`read_data`) its bytes.

    With `names`, only the blobs of these tasks are checked and the folder is not searched for orphans.
    """
    broken = list(_check_database(database))
    yield from broken
    if any(finding.kind == "database" for finding in broken):
        return  # rows of a broken database prove nothing about the files
    expected = _expected(database, names)
    for digest, size in expected.items():
        finding = _check_blob(database, blobs, digest, size, read_data=read_data)
        if finding is not None:
            yield finding
    if not names:
        yield from _strays(blobs, upkeep, expected)


def repair(database: Database, blobs: Blobs, upkeep: Upkeep) -> list[tuple[Finding, str]]:
    """Move every blob whose bytes are wrong to quarantine; return each finding with the blob's new place."""
    found = list(verify(database, blobs, upkeep, read_data=True))
    named = [(finding, finding.digest) for finding in found if finding.digest is not None]
    # A blob of another length than a row says may be what it was, and the row wrong.
    damaged = [
        (finding, digest)
        for finding, digest in named
        if finding.kind == "digest" or (finding.kind == "length" and not blobs.is_intact(digest))
    ]
    return [(finding, blobs.quarantine(digest)) for finding, digest in damaged]


def _check_database(database: Database) -> Iterator[Finding]:
    asked: list[tuple[Kind, str, str]] = [("row", *one) for one in _CONTRADICTIONS.items()]
    asked += [("dangling", *one) for one in _GAPS.items()]
    try:
        with database.connection() as connection:
            named = [
                (kind, fact.format(name), name)
                for kind, fact, query in asked
                for name in connection.exec_driver_sql(query).scalars()
            ]
        damage = list(database.damage())
    except DamagedStore as error:
        damage, named = [Damage("database", str(error))], []
    for found in damage:
        tasks = () if found.task is None else (found.task,)
        yield Finding(found.kind, found.fact, database.place, tasks=tasks)
    for kind, fact, name in named:
        yield Finding(kind, fact, database.place, tasks=(name,))


def _expected(database: Database, names: Sequence[str]) -> dict[str, int]:
    """Return digest -> length of every blob whose bytes rows need, or of those that some tasks need."""
    with database.read() as session:
        query = select(Blob.digest, Blob.size).order_by(Blob.digest)
        if names:
            ids = [find_task(session, name).id for name in names]
            base_ids = select(Task.base_model_id).where(Task.id.in_(ids))
            current = select(Generator.blob_id).where(Generator.is_current, Generator.base_model_id.in_(base_ids))
            needed = [*(rows.where(Task.id.in_(ids)) for _, rows in _needs_of_tasks()), current]
            query = query.where(or_(*(Blob.id.in_(select_ids) for select_ids in needed)))
        else:
            query = query.where(is_needed())
        return {row.digest: row.size for row in session.execute(query)}


def _needs_of_tasks() -> Iterator[tuple[BlobColumn, Select[int | None]]]:
    """Yield each column by which tasks need blobs, with the query of its values joined to the tasks."""
    for column in BLOB_COLUMNS:
        owner = column.class_
        if owner is Task:
            yield column, select(column)
        elif owner in (Adapter, TaskVector, Code):  # measurements name texts that need not be here
            rows = select(column).join(Task, owner.task_id == Task.id)
            yield column, rows.where(Adapter.evicted_at.is_(None)) if is_evictable(column) else rows
        elif owner is Extra:
            yield column, select(column).join(Adapter, Extra.adapter_id == Adapter.id).join(Task)


def _check_blob(database: Database, blobs: Blobs, digest: str, size: int, *, read_data: bool) -> Finding | None:
    fault = _fault(blobs, digest, size, read_data=read_data)
    if fault is None:
        return None
    kind, fact = fault
    with database.read() as session:
        # A damaged generator costs every task of its base model, so it is called by name.
        is_generator = session.scalar(select(Generator.id).join(Generator.blob).where(Blob.digest == digest))
        what = "blob" if is_generator is None else "generator"
        return Finding(kind, f"{what} {digest} {fact}", blobs.place(digest), digest, _tasks_of(session, digest))


def _fault(blobs: Blobs, digest: str, size: int, *, read_data: bool) -> tuple[Kind, str] | None:
    """Say what is wrong with the file of a blob, if anything is."""
    try:
        found = blobs.size(digest)
        if found != size:
            return "length", f"has {found} bytes instead of {size}"
        if read_data and not blobs.is_intact(digest):
            return "digest", "does not match its digest"
    except MissingBlob:
        return "missing", "is missing"
    except StoreIOError as error:
        return "digest", f"cannot be read: {error}"
    return None


def _tasks_of(session: Session, digest: str) -> tuple[str, ...]:
    blob_id = select(Blob.id).where(Blob.digest == digest).scalar_subquery()
    of_code = select(Task.name).join(Code, Code.task_id == Task.id).join(Generator, Code.generator_id == Generator.id)
    queries = [of_code.where(Generator.blob_id == blob_id)]
    for column, rows in _needs_of_tasks():
        queries.append(rows.with_only_columns(Task.name, maintain_column_froms=True).where(column == blob_id))
    names = {name for query in queries for name in session.scalars(query)}
    return tuple(sorted(names, key=str.lower))


def _strays(blobs: Blobs, upkeep: Upkeep, expected: dict[str, int]) -> Iterator[Finding]:
    for blob in blobs.all():
        if blob.digest not in expected:
            yield Finding("orphan", f"no row refers to blob {blob.digest}", blobs.place(blob.digest), blob.digest)
    for file in leftovers(blobs, upkeep):
        name = file.place.rpartition("/")[2]
        yield Finding("leftover", f"{name} was left by a command that was killed", file.place)
