"""Operations on tasks and their adapters."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

from sqlalchemy import BindParameter, ColumnElement, bindparam, delete, exists, func, select
from sqlalchemy.orm import Session, aliased, lazyload, selectinload

from registry import records
from registry import schema as models
from registry.errors import DamagedStore, LastCopy, TaskConflict
from registry.files import failpoint
from registry.names import check_name, check_note, check_tag
from registry.row_checks import find_wrong_tasks
from registry.storage import row_writer as rows
from registry.storage.folder import restore_reserve, with_reserve
from registry.tables.table import Table
from registry.to_records import adapter_record, code_record, task_record

if TYPE_CHECKING:
    from registry.filters import Selection

T = TypeVar("T")

_PAGE = 256


class Tasks(Table):
    """Tasks with their adapters."""

    def ingest(self, tasks: Sequence[records.TaskIngest]) -> list[records.IngestOutcome]:
        """Record tasks with all their adapters in one transaction; the same again changes nothing."""
        from registry.tables import ingest  # not needed to read tasks

        self._db.must_write()
        with self._db.connection(write=True) as connection:  # no ORM: a fleet has thousands of rows
            outcomes = ingest.record_tasks(connection, self._blobs, tasks)
            failpoint("rows-before-commit")
        failpoint("rows-committed")
        return outcomes

    def all(self) -> Iterator[records.TaskRecord]:
        """Yield all tasks by name. Each page is one short read, so that a slow reader delays nobody."""
        with self._db.read() as session:
            ids = session.scalars(select(models.Task.id).order_by(models.Task.name)).all()
        for some in rows.in_parts(ids, _PAGE):
            yield from self._undamaged(self._task_page, some)

    def named(self, names: Sequence[str]) -> list[records.TaskRecord]:
        """Return tasks by name, in any case, each as often as it is named."""
        found = list[records.TaskRecord]()
        for name in names:
            try:
                found.append(self.get(name))
            except DamagedStore as error:
                if self._on_damage is None or len(names) == 1:
                    raise
                self._on_damage(name, error)
        return found

    def get(self, name: str) -> records.TaskRecord:
        """Return a task by name, in any case."""
        with self._db.read() as session:
            return task_record(rows.find_task(session, name))

    def find(self, name: str) -> records.TaskRecord | None:
        """Return a task by name, in any case, or None: one look into an index, however many tasks there are."""
        with self._db.read() as session:
            row = session.scalar(select(models.Task).where(models.Task.name == name))
            return None if row is None else task_record(row)

    def a_config(self, base_model: str) -> str | None:
        """Return the digest of the configuration of one final adapter of a base model; None if there is none."""
        adapter, task = models.Adapter, models.Task
        query = select(models.Blob.digest, adapter.crc, models.Blob.crc)
        query = query.join_from(adapter, models.Blob, adapter.config_id == models.Blob.id)
        query = query.join(task, adapter.task_id == task.id).join(models.BaseModel)
        query = query.where(models.BaseModel.name == base_model, adapter.is_final).order_by(task.id).limit(1)
        with self._db.read() as session:
            row = session.execute(query).first()
        return None if row is None else row.digest

    def without_vectors(self) -> list[str]:
        """Return the names of the tasks that have no task vector yet, in order."""
        task, vector = models.Task, models.TaskVector
        with self._db.read() as session:
            has_vectors = exists().where(vector.task_id == task.id)
            return list(session.scalars(select(task.name).where(~has_vectors).order_by(task.name)))

    def origins(self) -> list[records.TaskOrigin]:
        """Return what every task is recognised by when its folder is met again, in order of names."""
        from registry.tables import ingest

        with self._db.connection() as connection:
            return ingest.task_origins(connection)

    def names(self, selection: Selection | None = None, *, without: Collection[int] = ()) -> list[str]:
        """Return the names of the selected tasks, in the order that the selection asks for."""
        ids = self._selected(selection, without)
        return [name for some in rows.in_parts(ids, _PAGE) for name in self._undamaged(self._name_page, some)]

    def summaries(
        self, selection: Selection | None = None, *, without: Collection[int] = ()
    ) -> Iterator[records.TaskSummary]:
        """Yield the selected tasks, in the order asked for, with what a listing shows of them; few at a time."""
        for some in rows.in_parts(self._selected(selection, without), _PAGE):
            yield from self._undamaged(self._summary_page, some)

    def _selected(self, selection: Selection | None, without: Collection[int]) -> Sequence[int]:
        from registry.tables import listing  # not needed to read one task

        with self._db.read() as session:
            query = listing.query(session, models.Task.id, selection)
            if without:  # before a limit counts
                numbers: BindParameter[int] = bindparam(None, list(without), expanding=True, literal_execute=True)
                query = query.where(models.Task.id.not_in(numbers))
            return session.scalars(query).all()

    def wrong_rows(self) -> dict[str, set[int]]:
        """Check all rows, also those that a listing counts, compares or passes over, and tell of the wrong ones.

        Return what is wrong with a row -> the numbers of the tasks whose figures depend on it.
        """
        with self._db.read() as session:
            found = find_wrong_tasks(session.connection(), models.Base.metadata)
        for fact, numbers in found.items():
            error = self._db.damaged_row(fact)
            if self._on_damage is None:
                raise error
            for name in sorted(map(self._name_of, numbers)) or ["a row of no task"]:
                self._on_damage(name, error)
        return found

    def _undamaged(self, load: Callable[[Sequence[int]], list[T]], ids: Sequence[int]) -> list[T]:
        """Load what some tasks are to be shown as, without those that have wrong rows."""
        try:
            return load(ids)
        except DamagedStore as error:
            if self._on_damage is None:
                raise
            if len(ids) > 1:
                return [one for number in ids for one in self._undamaged(load, [number])]
            self._on_damage(self._name_of(ids[0]), error)
            return []

    def _name_of(self, number: int) -> str:
        """Return the name of a task that may be damaged."""
        with self._db.read() as session:
            return session.scalar(select(models.Task.name).where(models.Task.id == number)) or f"number {number}"

    def adapters(self, task: str) -> list[records.AdapterRecord]:
        """Return the adapters of a task: checkpoints by step, the final one last."""
        return self.whole(task)[1]

    def whole(self, task: str) -> tuple[records.TaskRecord, list[records.AdapterRecord]]:
        """Return a task and its adapters, with one look; raise `DamagedStore` if it has no final one."""
        # The name may be spelled otherwise, or there is no such task.
        found = self.wholes([task]) or self.wholes([self.get(task).name])
        if not found:
            raise DamagedStore(f"task {task!r} has no final adapter", hint="remove it and ingest it again")
        return next(iter(found.values()))

    def wholes(self, tasks: Sequence[str]) -> dict[str, tuple[records.TaskRecord, list[records.AdapterRecord]]]:
        """Return task -> what `whole` returns of it, with one look; tasks that are not there are left out."""
        adapter = models.Adapter
        found: dict[str, tuple[records.TaskRecord, list[records.AdapterRecord]]] = {}
        with self._db.read() as session:
            for some in rows.in_parts(tasks):
                query = select(adapter).join(models.Task).where(models.Task.name.in_(some))
                for row in session.scalars(query.order_by(adapter.is_final, adapter.step, adapter.id)):
                    found.setdefault(row.task.name, (task_record(row.task), []))[1].append(adapter_record(row))
        return found

    def final(self, task: str) -> records.AdapterRecord:
        """Return the adapter of a task that is materialized."""
        adapter = models.Adapter
        with self._db.read() as session:
            query = select(adapter).where(adapter.task_id == rows.find_task(session, task).id, adapter.is_final)
            return adapter_record(session.scalars(query).one())

    def having(self, weights: str, config: str) -> list[records.AdapterRecord]:
        """Return the adapters of all tasks that have these weights and this configuration, by task."""
        adapter, (weights_blob, config_blob) = models.Adapter, (aliased(models.Blob), aliased(models.Blob))
        with self._db.read() as session:
            query = select(adapter).join(weights_blob, adapter.weights_id == weights_blob.id)
            query = query.join(config_blob, adapter.config_id == config_blob.id)
            query = query.where(weights_blob.digest == weights, config_blob.digest == config)
            return [adapter_record(row) for row in session.scalars(query.order_by(adapter.task_id, adapter.id))]

    def remove(self, names: Sequence[str], *, last_copies: Collection[str] = ()) -> list[records.TaskRecord]:
        """Forget tasks with everything derived from them, evicted ones only if `last_copies` names them."""

        def forget(task_id: int) -> None:
            with self._db.write() as session:
                session.execute(delete(models.Task).where(models.Task.id == task_id))

        from registry.storage.kept import keep  # not needed to read tasks

        self._db.must_write()
        with self._lock.exclusive():
            with self._db.read() as session:
                # All are checked before the first one goes.
                doomed = list(_doomed(session, names, last_copies))
            keep(self._db, self._paths)
            for task in doomed:  # each in a commit of its own, so that the journal stays small on a full disk
                with_reserve(self._paths, partial(forget, task.id))
            restore_reserve(self._paths)
        return doomed

    def plan_ingest(self, tasks: Sequence[records.TaskIngest]) -> list[records.IngestOutcome]:
        """Say what :meth:`ingest` would do, and write nothing; no blob need be in the store yet."""
        from registry.tables import ingest

        with self._db.connection() as connection:
            return ingest.plan_tasks(connection, tasks)

    def edit(
        self,
        names: Sequence[str],
        *,
        name: str | None = None,
        add_tags: Collection[str] = (),
        remove_tags: Collection[str] = (),
        note: str | Literal[False] | None = None,
        pinned: bool | None = None,
    ) -> list[records.TaskRecord]:
        """Change what users say of tasks: all of it, or nothing if anything is refused. Return the tasks, each once.

        Args:
            names: Tasks, in any case.
            name: A new name; for one task.
            add_tags: Tags to add. The case of tags does not matter.
            remove_tags: Tags to remove.
            note: A new note; False removes it.
            pinned: Whether their originals are never evicted.

        Raises:
            TaskConflict: Another task has the new name.
            InvalidName: The name, a tag or the note breaks its rule.
        """
        name = None if name is None else check_name(unicodedata.normalize("NFC", name))
        text = check_note(note) if isinstance(note, str) else None
        wanted, unwanted = {tag.lower(): check_tag(tag) for tag in add_tags}, {tag.lower() for tag in remove_tags}
        with self._db.write() as session:
            tasks = list(dict.fromkeys(rows.find_task(session, known) for known in names))
            for task in tasks:
                if name is not None and task.name != name:
                    other = rows.task_named(session, name)
                    if other is not None and other is not task:
                        raise TaskConflict(other.name, fact=f"a task is named {other.name!r} already", choices=None)
                    task.name = name
                if wanted or unwanted:
                    present = {tag.lower(): tag for tag in task.tags}
                    kept = {tag: shown for tag, shown in (wanted | present).items() if tag not in unwanted}
                    task.tags = tuple(kept[tag] for tag in sorted(kept))
                task.note = task.note if note is None else text
                task.pinned = task.pinned if pinned is None else pinned
            return [task_record(task) for task in tasks]

    def tags(self) -> dict[str, int]:
        """Return how many tasks have each tag, by tag."""
        with self._db.read() as session:
            rows = session.execute(select(models.Task.tags, models.Task.crc)).all()
        counts: dict[str, tuple[str, int]] = {}  # by tag in lower case; it is shown as it was first written
        for tag in (tag for tags, _ in rows for tag in tags):
            shown, before = counts.get(tag.lower(), (tag, 0))
            counts[tag.lower()] = shown, before + 1
        return dict(counts[tag] for tag in sorted(counts))

    def _name_page(self, ids: Sequence[int]) -> list[str]:
        with self._db.read() as session:
            query = select(models.Task.id, models.Task.name, models.Task.crc).where(models.Task.id.in_(ids))
            name_of = {number: name for number, name, _ in session.execute(query)}
        return [name_of[number] for number in ids if number in name_of]

    def _task_page(self, ids: Sequence[int]) -> list[records.TaskRecord]:
        with self._db.read() as session:
            query = select(models.Task).where(models.Task.id.in_(ids)).order_by(models.Task.name)
            return [task_record(row) for row in session.scalars(query)]

    def _summary_page(self, ids: Sequence[int]) -> list[records.TaskSummary]:
        with self._db.read() as session:
            query = select(models.Task).where(models.Task.id.in_(ids)).options(selectinload(models.Task.base_model))
            found = {task.id: task for task in session.scalars(query)}
            return _summaries(session, [found[number] for number in ids if number in found])


def _doomed(session: Session, names: Sequence[str], last_copies: Collection[str]) -> Iterator[records.TaskRecord]:
    """Yield the tasks of some names, each once; raise where one may not go."""
    allowed = {name.lower() for name in last_copies}
    for row in dict.fromkeys(rows.find_task(session, name) for name in names):
        final = rows.find_final(session, row.id)
        if final is not None and final.evicted_at is not None and row.name.lower() not in allowed:
            fact = f"task {row.name!r} was evicted: its code is the only copy"
            raise LastCopy(fact, hint="run the same command again to remove it nevertheless")
        yield task_record(row)


def _summaries(session: Session, tasks: Sequence[models.Task]) -> list[records.TaskSummary]:
    ids = [task.id for task in tasks]
    adapter, vector, code = models.Adapter, models.TaskVector, models.Code
    # The tasks are here already, and many adapters share a description: each is read, and checked, once.
    finals = session.scalars(
        select(adapter)
        .where(adapter.task_id.in_(ids), adapter.is_final)
        .options(lazyload(adapter.task), selectinload(adapter.description), selectinload(adapter.config))
    )
    codes = session.scalars(
        select(code)
        .join(models.Generator, code.generator_id == models.Generator.id)
        .where(code.task_id.in_(ids), models.Generator.is_current)
        .options(lazyload(code.task))
    )
    gain_of = _gains(session, ids)
    final_of = {row.task_id: adapter_record(row) for row in finals}
    code_of = {row.task_id: code_record(row) for row in codes}
    adapters = _counts(session, adapter, ids, adapter.evicted_at.is_(None), ~adapter.is_final)
    evicted = _counts(session, adapter, ids, adapter.evicted_at.is_not(None), ~adapter.is_final)
    vectors = _counts(session, vector, ids)
    if lost := [task.name for task in tasks if task.id not in final_of]:
        raise DamagedStore(f"task {lost[0]!r} has no final adapter", hint="remove it and ingest it again")
    return [
        records.TaskSummary(
            task=task_record(task),
            final=final_of[task.id],
            checkpoints=adapters.get(task.id, 0),
            evicted_checkpoints=evicted.get(task.id, 0),
            vectors=vectors.get(task.id, 0),
            code=code_of.get(task.id),
            gain=gain_of[task.id][0],
            gain_precision=gain_of[task.id][1],
        )
        for task in tasks
    ]


def _gains(session: Session, ids: Sequence[int]) -> dict[int, tuple[float | None, str | None]]:
    """Return task -> the retained gain of what it decodes to, and the precision of the base model in that."""
    from registry.tables import listing

    task, row, how = models.Task, models.Evaluation, models.Document
    measured = select(task.id, listing.measured(models.Evaluation.id).label("number")).where(task.id.in_(ids))
    number_of = {found.id: found.number for found in session.execute(measured)}
    query = select(row.id, row.retained_gain, how.body, row.crc, how.crc).join(how, how.id == row.settings_id)
    rows = session.execute(query.where(row.id.in_(filter(None, number_of.values()))))
    gains = {number: (gain, settings.get("dtype")) for number, gain, settings, *_ in rows}
    return {task_id: gains.get(number, (None, None)) for task_id, number in number_of.items()}


def _counts(
    session: Session,
    table: type[models.Adapter] | type[models.TaskVector],
    task_ids: Sequence[int],
    *conditions: ColumnElement[bool],
) -> dict[int, int]:
    query = select(table.task_id, func.count().label("number"))
    query = query.where(table.task_id.in_(task_ids), *conditions).group_by(table.task_id)
    return {row.task_id: row.number for row in session.execute(query)}
