"""Base models and their labels: one base model may have several names.

    base model  meta-llama/Meta-Llama-3-8B-Instruct      its own name
      labels    unsloth/llama-3-8b-Instruct-bnb-4bit     names that were joined to it
                /models/llama-3

A label that is joined brings its tasks and, if only it has a generator, that. Codes stay with the generator that made
them, so nothing has to be encoded again. A task remembers its label, so that the label can be separated again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from sqlalchemy import Connection, delete, func, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from registry import records
from registry import schema as models
from registry.errors import BaseModelConflict, LastCopy
from registry.names import UNKNOWN_BASE, LoadIn
from registry.storage.row_writer import RowWriter, in_parts, table_of
from registry.tables.codes import restore_hint_of
from registry.tables.generators import find_current
from registry.tables.runs import finish_run
from registry.tables.table import Table
from registry.to_records import code_record, record


@dataclass(frozen=True)
class Joined:
    """What joining labels to a base model did."""

    name: str  # of the base model
    labels: tuple[str, ...] = ()  # that are new to it
    tasks: int = 0  # that came with them
    generators: int = 0  # versions that came with them
    without_code: tuple[str, ...] = ()  # tasks that had a code and have none under the generator that stays


@dataclass(frozen=True)
class Separated:
    """What separating a label from its base model did."""

    label: str
    tasks: int  # that went with it
    generators: int  # versions that went with it, because no task stayed
    codes: int  # that were deleted, because their generator stayed


class BaseModels(Table):
    """Base models, known by the labels that adapters give them."""

    def all(self) -> list[records.BaseModelRecord]:
        """Return the base models by name."""
        base, label = models.BaseModel, models.BaseLabel
        with self._db.read() as session:
            labels: dict[int, list[records.LabelRecord]] = {}
            for row in session.scalars(select(label).order_by(label.label)):
                labels.setdefault(row.base_model_id, []).append(
                    records.LabelRecord(row.label, cast(records.JoinReason, row.reason), row.path)
                )
            count = select(func.count()).where(models.Task.base_model_id == base.id).scalar_subquery()
            return [
                record(records.BaseModelRecord, row, tasks=tasks, labels=tuple(labels.get(row.id, ())))
                for row, tasks in session.execute(select(base, count).order_by(base.name))
            ]

    def name_of(self, label: str) -> str:
        """Return the name of the base model that has a label; the label itself if the store does not know it."""
        with self._db.connection() as connection:
            return names_of(connection, [label])[label]

    def set_path(
        self, name: str, path: str | None, *, loader: str | None = None, load_in: LoadIn | None = None
    ) -> None:
        """Record where a base model, under any label of it, is on this machine, and what loads it; None forgets it.

        `load_in` is the few bits that its weights are loaded in; None for what the device suits.
        """
        with self._db.write() as session:
            row = RowWriter(session, self._blobs).base_model(name)
            row.path, row.loader, row.load_in = path, loader, load_in

    def set_facts(self, name: str, *, fingerprint: str, shape: records.Json) -> None:
        """Record what a base model turned out to be when it was loaded. Works on a full disk."""

        def write() -> None:
            with self._db.write() as session:
                row = RowWriter(session, self._blobs).base_model(name)
                row.fingerprint, row.shape = fingerprint, dict(shape)

        self._upkeep.run(write)

    def join(
        self, name: str, labels: Sequence[str], *, reason: records.JoinReason = "told", keep: str | None = None
    ) -> Joined:
        """Give a base model more labels, with their tasks and generators, in one transaction.

        Args:
            name: any label of the base model; it need not be in the store.
            labels: what else it is called; those that are base models of their own stop being that.
            reason: how it is known that they are the same model.
            keep: where both have a generator, a label of the one that stays the current one.
        """
        with self._write() as writer:
            session = writer.session
            base = writer.base_model(name)
            session.flush()
            joining = _Joining(writer, base, reason, keep)
            for label in dict.fromkeys(labels):
                joining.add(label)
            without_code = tuple(sorted(joining.lost - set(_coded(session, base))))
        self._drop(joining.garbage)
        return Joined(base.name, tuple(joining.labels), joining.tasks, joining.generators, without_code)

    def separate(self, label: str) -> Separated:
        """Make a label a base model of its own again, with the tasks whose adapters name it, in one transaction.

        If no task stays, the generators go with the label. Otherwise the tasks lose their codes, vectors and
        measurements, which may have been made with another model.

        Raises:
            BaseModelConflict: The label is not joined to a base model.
            LastCopy: Only the code of a task is left, and its generator stays.
        """
        with self._write() as writer:
            session = writer.session
            row = session.scalar(select(models.BaseLabel).where(models.BaseLabel.label == label))
            if row is None:
                fact = f"{label!r} is not a label of any base model"
                raise BaseModelConflict(fact, hint="run `icm base ls` to list all labels")
            old, new = row.base_model, models.BaseModel(name=label, path=row.path)
            if row.path == old.path:
                new.loader, new.load_in = old.loader, old.load_in
            session.add(new)
            session.flush()
            task = models.Task
            leaving = list(session.scalars(select(task.id).where(task.label_id == row.id)))
            count = select(func.count()).select_from(task).where(task.base_model_id == old.id)
            is_whole = bool(leaving) and session.scalar(count) == len(leaving)
            generators = _move(session, models.Generator, old, new) if is_whole else 0
            garbage, codes = ([], 0) if is_whole else _forget_derived(session, leaving)
            session.execute(update(task).where(task.label_id == row.id).values(base_model_id=new.id, label_id=None))
            session.delete(row)
            session.flush()
        self._drop(garbage)
        return Separated(label, len(leaving), generators, codes)


def names_of(connection: Connection, labels: Iterable[str]) -> dict[str, str]:
    """Return label -> name of its base model, which is the label itself where the store does not know it."""
    return {label: name for label, (name, _) in find_labels(connection, labels).items()}


def find_labels(connection: Connection, labels: Iterable[str]) -> Mapping[str, tuple[str, int | None]]:
    """Return label -> name of its base model and number of the label; None where it is the base model's own name."""
    table, bases = table_of(models.BaseLabel), table_of(models.BaseModel)
    found: dict[str, tuple[str, int | None]] = {label: (label, None) for label in labels}
    for some in in_parts(list(found)):
        query = select(table.c.label, bases.c.name, table.c.id, table.c.crc, bases.c.crc).join_from(table, bases)
        rows = connection.execute(query.where(table.c.label.in_(some)))
        found |= {label: (name, number) for label, name, number, *_ in rows}
    return found


@dataclass
class _Joining:
    """Labels on their way to a base model, in an open transaction, and what comes with them."""

    writer: RowWriter
    base: models.BaseModel
    reason: records.JoinReason
    keep: str | None
    labels: list[str] = field(default_factory=list)
    tasks: int = 0
    generators: int = 0
    lost: set[str] = field(default_factory=set)  # tasks whose code was that of a generator that does not stay
    garbage: list[str] = field(default_factory=list)

    def add(self, label: str) -> None:
        """Give the base model a label, and all that a base model of this name has."""
        session, base = self.writer.session, self.base
        if UNKNOWN_BASE in (label, base.name):
            fact = f"{UNKNOWN_BASE!r} groups the adapters without a base model, so it cannot be joined"
            raise BaseModelConflict(fact, hint="specify their base model with `icm ingest --base-model NAME`")
        other = self.writer.find_base_model(label)
        if other is base:
            return
        if other is not None and other.name != label:
            fact = f"{label!r} is a label of {other.name!r}"
            hint = f"join {other.name} instead, or run `icm base alias {other.name} {label} --remove` first"
            raise BaseModelConflict(fact, hint=hint)
        path = None if other is None else other.path
        row = models.BaseLabel(label=label, base_model=base, reason=self.reason, path=path)
        session.add(row)
        session.flush()
        self.labels.append(label)
        if other is not None:
            self._merge(other, row)

    def _merge(self, other: models.BaseModel, row: models.BaseLabel) -> None:
        """Move everything of a base model to this one, of which its name becomes a label."""
        session, base, task, run = self.writer.session, self.base, models.Task, models.TrainRun
        self.lost |= set(_settle_generators(session, base, other, self.keep))
        # A stopped training does not go on: it read the tasks of one of the two only.
        running = session.scalars(select(run.id).where(run.base_model_id == other.id, run.state == "running"))
        for number in list(running):
            self.garbage += finish_run(self.writer, number)
        self.generators += _move(session, models.Generator, other, base)
        _move(session, run, other, base)
        own = task.base_model_id == other.id
        session.execute(update(task).where(own, task.label_id.is_(None)).values(label_id=row.id))
        self.tasks += _move(session, task, other, base)
        _move(session, models.BaseLabel, other, base)
        if base.path is None and other.loader is not None:  # a loader stays with its path
            base.path, base.loader = other.path, other.loader
        if base.loader is None:
            base.load_in = base.load_in or other.load_in
        if base.fingerprint is None:
            base.fingerprint, base.shape = other.fingerprint, other.shape
        session.flush()
        session.expire_all()
        session.delete(other)
        session.flush()
        self.writer.forget_base_models()


def _settle_generators(
    session: Session, base: models.BaseModel, other: models.BaseModel, keep: str | None
) -> Collection[str]:
    """Leave at most one of two current generators current, and return the tasks that lose their code by that."""
    mine, theirs = find_current(session, base.name), find_current(session, other.name)
    if mine is None or theirs is None:
        return ()
    if keep is None:
        fact = f"{base.name!r} and {other.name!r} both have a generator"
        hint = "choose the one to use with --keep NAME, then run `icm train --update` to encode the tasks of the other"
        raise BaseModelConflict(fact, hint=hint)
    names = session.scalars(select(models.BaseLabel.label).where(models.BaseLabel.base_model_id == base.id))
    if keep not in (base.name, other.name, *names):
        fact = f"{keep!r} is neither {base.name!r} nor {other.name!r}"
        raise BaseModelConflict(fact, hint="use --keep with the name of one of the two")
    out, stays = (mine, theirs) if keep == other.name else (theirs, mine)
    lost = _coded(session, out.base_model)
    if evicted := _evicted(session, out):
        fact = f"the generator of {stays.base_model.name!r} has no code for evicted {', '.join(map(repr, evicted[:3]))}"
        raise LastCopy(fact, hint=f"keep the other generator, or {restore_hint_of(session, evicted)}")
    out.is_current = False
    session.flush()
    # Versions of one base model have different numbers; those that move come after those that are there.
    generator = models.Generator
    latest = session.scalar(select(func.max(generator.version)).where(generator.base_model_id == base.id)) or 0
    query = select(generator).where(generator.base_model_id == other.id).order_by(generator.version.desc())
    for row in session.scalars(query):
        row.version += latest
        session.flush()
    return lost


def _coded(session: Session, base: models.BaseModel) -> list[str]:
    """Return the tasks that have a code under the current generator of a base model."""
    code, generator = models.Code, models.Generator
    query = select(models.Task.name).join(code, code.task_id == models.Task.id)
    query = query.join(generator, code.generator_id == generator.id)
    return list(session.scalars(query.where(generator.base_model_id == base.id, generator.is_current)))


def _evicted(session: Session, generator: models.Generator) -> list[str]:
    """Return the tasks without an original that have a code under a generator."""
    code, adapter = models.Code, models.Adapter
    query = select(models.Task.name).join(code, code.task_id == models.Task.id)
    query = query.join(adapter, adapter.task_id == models.Task.id).where(code.generator_id == generator.id)
    query = query.where(adapter.is_final, adapter.evicted_at.is_not(None))
    return list(session.scalars(query.order_by(models.in_any_case(models.Task.name))))


def _forget_derived(session: Session, tasks: Sequence[int]) -> tuple[list[str], int]:
    """Delete what was made of some tasks with a base model; return the digests that may be garbage, and the codes."""
    code, adapter, task = models.Code, models.Adapter, models.Task
    garbage: list[str] = []
    count = 0
    for some in in_parts(tasks):
        query = select(task.name).join(adapter, adapter.task_id == task.id)
        query = query.where(task.id.in_(some), adapter.is_final, adapter.evicted_at.is_not(None))
        if evicted := session.scalar(query):
            fact = f"task {evicted!r} was evicted, and its code needs the generator of the other tasks"
            raise LastCopy(fact, hint=restore_hint_of(session, [evicted]))
        for row in session.scalars(select(code).where(code.task_id.in_(some))):
            garbage.extend(code_record(row).digests())
            count += 1
        for table in (code, models.TaskVector, models.Evaluation):
            session.execute(delete(table).where(table.task_id.in_(some)))
    return garbage, count


def _move(
    session: Session,
    table: type[models.Generator] | type[models.TrainRun] | type[models.Task] | type[models.BaseLabel],
    old: models.BaseModel,
    new: models.BaseModel,
) -> int:
    column: InstrumentedAttribute[int] = table.base_model_id
    found = session.scalar(select(func.count()).select_from(table).where(column == old.id)) or 0
    session.execute(update(table).where(column == old.id).values(base_model_id=new.id))
    return found
