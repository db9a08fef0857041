"""Operations on tasks and their adapters."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from sqlalchemy import delete, exists, select
from sqlalchemy.orm import Session, aliased

from registry import records
from registry import schema as models
from registry.errors import DamagedStore, LastCopy, TaskConflict
from registry.files import failpoint
from registry.names import check_name, check_note, check_tag, folded
from registry.storage import row_writer as rows
from registry.tables.summaries import Summaries
from registry.to_records import adapter_record, task_record

if TYPE_CHECKING:
    from registry.tables.origins import Origins


class Tasks(Summaries):
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

    def without_vectors(self, names: Sequence[str]) -> dict[str, str]:
        """Return which of some tasks have no task vector yet, in order of names, each with its base model."""
        task, base, vector = models.Task, models.BaseModel, models.TaskVector
        query = select(task.name, base.name, task.crc, base.crc).join(base, task.base_model_id == base.id)
        query = query.where(~exists().where(vector.task_id == task.id)).order_by(models.in_any_case(task.name))
        with self._db.read() as session:
            some = rows.listed(session.connection(), map(folded, names))
            return {row[0]: row[1] for row in session.execute(query.where(task.name.in_(some)))}

    def origins(self) -> Origins:
        """Return what looks up tasks by what they are recognised by when their folders are met again."""
        from registry.tables.origins import Origins

        return Origins(self._db)

    def adapters(self, task: str) -> list[records.AdapterRecord]:
        """Return the adapters of a task: checkpoints by step, the final one last."""
        return self.whole(task)[1]

    def whole(self, task: str) -> tuple[records.TaskRecord, list[records.AdapterRecord]]:
        """Return a task and its adapters, with one look; raise `DamagedStore` if it has no final one."""
        # The name may be spelled otherwise, or there is no such task.
        found = self.wholes([task]) or self.wholes([self.get(task).name])
        if not found:
            raise DamagedStore(
                f"task {task!r} has no final adapter", hint="remove the task with `icm rm` and ingest it again"
            )
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

        self._db.must_write()
        with self._lock.exclusive():
            with self._db.read() as session:
                # All are checked before the first one goes.
                doomed = list(_doomed(session, names, last_copies))
            self._upkeep.before_deletion()
            for task in doomed:  # each in a commit of its own, so that the journal stays small on a full disk
                self._upkeep.run(partial(forget, task.id))
            self._upkeep.after_deletion()
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
                        raise TaskConflict(
                            other.name, fact=f"there is already a task named {other.name!r}", choices=None
                        )
                    task.name = name
                if wanted or unwanted:
                    present = {tag.lower(): tag for tag in task.tags}
                    kept = {tag: shown for tag, shown in (wanted | present).items() if tag not in unwanted}
                    task.tags = tuple(kept[tag] for tag in sorted(kept))
                task.note = task.note if note is None else text
                task.pinned = task.pinned if pinned is None else pinned
            return [task_record(task) for task in tasks]

    def set_files(self, task: str, files: Mapping[str, records.Extra | None]) -> None:
        """Keep files next to the final adapter of a task, each in place of one of its name; None takes that away.

        Their blobs are in the store already.
        """
        adapter, extra = models.Adapter, models.Extra
        with self._write() as writer:
            session = writer.session
            query = select(adapter).where(adapter.task_id == rows.find_task(session, task).id, adapter.is_final)
            final = session.scalars(query).one()
            session.execute(delete(extra).where(extra.adapter_id == final.id, extra.file.in_(list(files))))
            for name, file in files.items():
                if file is not None:
                    row = extra(adapter_id=final.id, file=name, blob=writer.blob(file.blob), size=file.size)
                    session.add(row)

    def tags(self) -> dict[str, int]:
        """Return how many tasks have each tag, by tag."""
        with self._db.read() as session:
            rows = session.execute(select(models.Task.tags, models.Task.crc)).all()
        counts: dict[str, tuple[str, int]] = {}  # by tag in lower case; it is shown as it was first written
        for tag in (tag for tags, _ in rows for tag in tags):
            shown, before = counts.get(tag.lower(), (tag, 0))
            counts[tag.lower()] = shown, before + 1
        return dict(counts[tag] for tag in sorted(counts))


def _doomed(session: Session, names: Sequence[str], last_copies: Collection[str]) -> Iterator[records.TaskRecord]:
    """Yield the tasks of some names, each once; raise where one may not go."""
    allowed = {name.lower() for name in last_copies}
    for row in dict.fromkeys(rows.find_task(session, name) for name in names):
        final = rows.find_final(session, row.id)
        if final is not None and final.evicted_at is not None and row.name.lower() not in allowed:
            fact = f"task {row.name!r} was evicted: its code is the only copy"
            raise LastCopy(fact, hint="run the same command again to remove it anyway")
        yield task_record(row)
