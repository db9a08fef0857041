"""What all kinds of rows have in common: a transaction to write them in, and how their bytes go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from registry.files import failpoint

if TYPE_CHECKING:
    from registry.schema import Evaluation, TaskVector
    from registry.storage.blobs.content import Blobs
    from registry.storage.database import Database
    from registry.storage.folder import Upkeep
    from registry.storage.locks import StoreLock
    from registry.storage.row_writer import RowWriter
    from registry.store import OnDamage

Record = TypeVar("Record")


class Table:
    """Operations on one kind of row; a `registry.store.Store` has one of each."""

    def __init__(
        self,
        upkeep: Upkeep,
        lock: StoreLock,
        database: Database,
        blobs: Blobs,
        on_damage: OnDamage | None = None,
    ) -> None:
        self._upkeep, self._lock, self._db, self._blobs, self._on_damage = upkeep, lock, database, blobs, on_damage

    @contextmanager
    def _write(self) -> Iterator[RowWriter]:
        """Open a transaction for rows that refer to durable bytes; leaving the block commits."""
        from registry.storage.row_writer import RowWriter  # imports SQLAlchemy

        with self._db.write() as session:
            yield RowWriter(session, self._blobs)
            failpoint("rows-before-commit")
        failpoint("rows-committed")

    def _drop(self, digests: Iterable[str]) -> None:
        """Delete files that rows no longer name, after the commit, if no other process uses the store."""
        from registry.storage.prune import drop_unreferenced  # readers delete nothing

        drop_unreferenced(self._lock, self._db, self._blobs, digests)

    def _by_task(
        self, model: type[Evaluation] | type[TaskVector], to_record: Callable[[Any], Record], tasks: Sequence[str]
    ) -> dict[str, list[Record]]:
        """Return task -> the records of its rows, for tasks that have some; rows of other tasks are not looked at."""
        from sqlalchemy import select

        from registry.schema import Task
        from registry.storage.row_writer import in_parts

        found = defaultdict[str, list[Record]](list)
        with self._db.read() as session:
            for some in in_parts(tasks):
                query = select(model, Task.name).join(Task, model.task_id == Task.id).where(Task.name.in_(some))
                for row, name in session.execute(query.order_by(model.id)):
                    found[name].append(to_record(row))
        return found
