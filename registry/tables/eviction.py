"""Originals: the weights as they were ingested, and deleting them for good.

rows say "evicted" ──commit──▶ files are deleted       both under the exclusive lock
                        `── a kill here leaves weights that no row needs; the next evict checks their code once more,
                            as that of any original, before it deletes them
"""

from __future__ import annotations

from collections import Counter

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from registry import schema as models
from registry.errors import DamagedBlob, LastCopy, StoreIOError
from registry.files import failpoint
from registry.records import AdapterRecord, Eviction
from registry.storage.prune import drop_evicted, evicted_files
from registry.storage.row_writer import find_final, find_task, in_parts, utc_now
from registry.tables.evaluations import record_evaluation
from registry.tables.table import Table
from registry.to_records import adapter_record


class Originals(Table):
    """The weights as they were ingested."""

    def in_use(self) -> dict[str, int]:
        """Return digest -> number of adapters that need these weights; a file is deleted with the last of them."""
        adapter, found = models.Adapter, Counter[str]()
        with self._db.read() as session:
            for column in (adapter.weights_id, adapter.initial_id):
                query = select(models.Blob.digest, func.count()).join(adapter, column == models.Blob.id)
                query = query.where(adapter.evicted_at.is_(None)).group_by(models.Blob.digest)
                found.update({row[0]: row[1] for row in session.execute(query)})
        return found

    def interrupted(self) -> set[str]:
        """Return the digests of weights that rows call deleted and that are still there: a killed `evict` left them.

        In a remote place any eviction leaves what is young, and `prune` deletes it.
        """
        if self._blobs.is_remote:
            return set()
        return set(evicted_files(self._db, self._blobs))

    def check_alone(self) -> None:
        """Wait until no other process uses the store, before measuring for minutes; raise `StoreLocked` if one does."""
        self._db.must_write()
        with self._lock.exclusive():
            pass

    def evict(self, eviction: Eviction) -> int:
        """Delete the weights of some adapters of a task, for good; return the bytes freed. Works on a full disk.

        Raises:
            DamagedStore: Something that must remain is damaged, or cannot be read.
            LastCopy: The task changed since its code was checked, or is pinned.
        """
        self._db.must_write()

        def delete() -> int:
            with self._db.write() as session:
                code = _code_to_rely_on(session, eviction)
                # Damage since the check would make these weights the last good copy.
                for digest in eviction.digests():
                    self._check(digest)
                digests = _mark_evicted(session, eviction, code)
                failpoint("rows-before-commit")
            failpoint("eviction-committed")
            # Bytes last: a kill before this leaves files that no row needs.
            return drop_evicted(self._db, self._blobs, digests)

        with self._lock.exclusive():
            self._upkeep.before_deletion()
            freed = self._upkeep.run(delete)
            self._upkeep.after_deletion()
        return freed

    def _check(self, digest: str) -> None:
        try:
            self._blobs.check(digest)
        except StoreIOError as error:  # a bad sector costs this task its eviction, and not the others theirs
            raise DamagedBlob(f"blob {digest} cannot be read: {error}", path=error.path, hint=error.hint) from error


def _code_to_rely_on(session: Session, eviction: Eviction) -> models.Code:
    """Return the row of the code that was checked; raise if the task has another one by now."""
    task, code = find_task(session, eviction.task), eviction.code
    if task.pinned:
        hint = "run `icm edit TASK --no-pin` to unpin it"
        raise LastCopy(f"task {task.name!r} is pinned", hint=hint)
    row, generator = session.get(models.Code, code.id), session.get(models.Generator, eviction.generator.id)
    final = find_final(session, task.id)
    if (
        row is None
        or generator is None
        or final is None
        or not generator.is_current
        or (row.task_id, row.generator_id, row.adapter_id) != (task.id, generator.id, final.id)
        or generator.blob.digest != eviction.generator.blob
        or (row.blob.digest, row.residual and row.residual.digest) != (code.blob, code.residual and code.residual.blob)
        or not _is_same(adapter_record(final), eviction.final)
    ):
        raise LastCopy(
            f"task {task.name!r} changed while its code was being checked", hint="run the same command again"
        )
    return row


def _is_same(now: AdapterRecord, checked: AdapterRecord) -> bool:
    """Say whether a final adapter is the one that was checked, with the same files kept in addition to its code."""
    first, second = ((row.weights, row.initial, row.config, row.extras) for row in (now, checked))
    return first == second


def _mark_evicted(session: Session, eviction: Eviction, row: models.Code) -> list[str]:
    """Write what an eviction changes in an open transaction, and return the digests that may go."""
    adapter, now = models.Adapter, utc_now()
    digests: list[str] = []
    for some in in_parts(eviction.adapters):
        chosen = (adapter.task_id == row.task_id, adapter.id.in_(some))
        for blob in (adapter.weights, adapter.initial):
            digests += session.scalars(select(models.Blob.digest).join(blob).where(*chosen))
        session.execute(update(adapter).where(*chosen, adapter.evicted_at.is_(None)).values(evicted_at=now))
    # The error belongs to the source that replaces the original.
    if row.residual is None:
        row.squared_error = eviction.squared_error
    else:
        row.residual_squared_error = eviction.squared_error
    for evaluation in eviction.evaluations:
        record_evaluation(session, evaluation, now)
    session.flush()
    return digests
