"""Codes of tasks under a generator, each with its residual and the limits that it was made for.

A code is made of an adapter that was read minutes ago. If the task has another one when the code is recorded, the code
is left out. The only copy of a task, whose original was evicted, is never replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry import records
from registry import schema as models
from registry.errors import GeneratorConflict, LastCopy
from registry.names import some
from registry.storage.row_writer import RowWriter, final_if_unchanged, final_under_any_name, find_task, in_parts
from registry.tables.table import Table
from registry.to_records import code_record

CodeFiles = tuple[int, int | None]
"""The rows of the blobs of a code and of its residual."""

_LIMITS = tuple(field.name for field in fields(records.CodeLimits))


class Codes(Table):
    """Codes, one for each task and generator."""

    def get(self, task: str, generator_id: int) -> records.CodeRecord | None:
        """Return the code of a task under a generator, if it has one."""
        found = self.of([task], generator_id)
        if not found:  # few have none: for the others one look is enough
            with self._db.read() as session:
                name = find_task(session, task).name
            found = self.of([name], generator_id)
        return next(iter(found.values()), None)

    def of(self, tasks: Sequence[str], generator_id: int) -> dict[str, records.CodeRecord]:
        """Return task -> its code under a generator, for those that have one."""
        code = models.Code
        query = select(code).join(code.task).where(code.generator_id == generator_id)
        with self._db.read() as session:
            parts = (session.scalars(query.where(models.Task.name.in_(some))) for some in in_parts(tasks))
            return {row.task.name: code_record(row) for part in parts for row in part}

    def all(self, generator_id: int) -> list[records.CodeRecord]:
        """Return all codes of a generator, by task name."""
        code = models.Code
        with self._db.read() as session:
            query = select(code).join(code.task).where(code.generator_id == generator_id)
            query = query.order_by(models.in_any_case(models.Task.name))
            return [code_record(row) for row in session.scalars(query)]

    def add(
        self, generator_id: int, codes: Sequence[records.NewCode], run_id: int | None = None
    ) -> list[records.CodeRecord]:
        """Record codes under the current generator, for tasks that have none and the same adapter still.

        `run_id` is the run that ends with them.
        """
        with self._write() as writer:
            generator = current_row(writer.session, generator_id)
            # Another process may have encoded some of them since they were chosen.
            known = code_files(writer.session, generator.id)
            new = list(code_rows(writer, generator, [code for code in codes if code.adapter.task not in known]))
            writer.session.add_all(new)
            writer.session.flush()
            made, garbage = [code_record(row) for row in new], list[str]()
            if run_id is not None:
                from registry.tables.runs import finish_run  # only an update needs it

                garbage = finish_run(writer, run_id)
        self._drop(garbage)
        return made

    def replace(
        self, generator_id: int, new: records.NewCode, evaluations: Sequence[records.NewEvaluation] = ()
    ) -> records.CodeRecord | None:
        """Record a code in place of the task's present one; return None if the task has another adapter by now."""
        code = models.Code
        with self._write() as writer:
            session = writer.session
            generator, adapter = current_row(session, generator_id), final_if_unchanged(session, new.adapter)
            if adapter is None:
                return None
            _must_have_original(adapter)
            row = session.scalar(select(code).where(code.task_id == adapter.task_id, code.generator_id == generator.id))
            # Read before the row changes; deleted after the commit.
            old = set() if row is None else set(code_record(row).digests())
            if row is None:
                row = code(task=adapter.task, generator_id=generator.id)
                session.add(row)
            row.adapter_id, row.blob = adapter.id, writer.blob(new.blob)
            row.bits, row.squared_error, row.effect, row.claim = new.bits, new.squared_error, new.effect, None
            # A residual corrects the code that it was made for, and no other.
            row.residual, row.residual_squared_error = None, None
            _set_limits(writer, row, new.asked)
            _replace_evaluations(writer, row, ("code", "residual", "generate"), evaluations)
            record = code_record(row)
        self._drop(old - {new.blob})
        return record

    def replace_residual(
        self,
        present: records.CodeRecord,
        new: records.NewResidual | None,
        asked: records.CodeLimits,
        evaluations: Sequence[records.NewEvaluation] = (),
    ) -> records.CodeRecord | None:
        """Record the residual of a code, or that it has none; return None if the task has another code by now."""
        with self._write() as writer:
            row = writer.session.get(models.Code, present.id)
            if row is None or (row.task.name, row.blob.digest) != (present.task, present.blob):
                return None
            _must_have_original(writer.session.get_one(models.Adapter, row.adapter_id))
            old = set() if row.residual is None else {row.residual.digest}
            row.residual = None if new is None else writer.blob(new.blob)
            row.residual_squared_error = None if new is None else new.squared_error
            _set_limits(writer, row, asked)
            _replace_evaluations(writer, row, ("residual",), evaluations)
            record = code_record(row)
        self._drop(old if new is None else old - {new.blob})
        return record


def _must_have_original(adapter: models.Adapter) -> None:
    if adapter.evicted_at is not None:
        fact = f"the code of task {adapter.task.name!r} is the only copy of its adapter and cannot be replaced"
        raise LastCopy(fact, hint=restore_hint({adapter.task.name: adapter.is_generated}))


def _set_limits(writer: RowWriter, row: models.Code, asked: records.CodeLimits | None) -> None:
    for column, value in limit_columns(asked).items():
        setattr(row, column, value)
    writer.session.flush()


def _replace_evaluations(
    writer: RowWriter, row: models.Code, rungs: Sequence[records.Rung], new: Sequence[records.NewEvaluation]
) -> None:
    """Forget what was measured of the earlier files of a code, and record what was measured of the new ones."""
    session, evaluation = writer.session, models.Evaluation
    from registry.tables.evaluations import record_evaluation  # most commands only read codes

    measured = (evaluation.task_id == row.task_id, evaluation.rung.in_(rungs))
    session.execute(delete(evaluation).where(*measured, evaluation.generator_id == row.generator_id))
    for one in new:
        record_evaluation(session, one, writer.now)
    session.flush()


def current_row(session: Session, generator_id: int | None) -> models.Generator:
    """Return the row of a generator; raise if it is not the current one of its base model (any more)."""
    row = None if generator_id is None else session.get(models.Generator, generator_id)
    if row is None or not row.is_current:
        fact = "another process replaced the current generator"
        raise GeneratorConflict(fact, hint="run the same command again")
    return row


def code_rows(
    writer: RowWriter, generator: models.Generator, codes: Sequence[records.NewCode]
) -> Iterator[models.Code]:
    """Make the rows of codes, without those whose task is gone or has another adapter by now."""
    writer.session.flush()  # so that the generator has its number
    adapter_ids = [new.adapter.id for new in codes]
    query, number = select(models.Adapter), models.Adapter.id
    in_session = [row for ids in in_parts(adapter_ids) for row in writer.session.scalars(query.where(number.in_(ids)))]
    for new in codes:
        adapter = final_under_any_name(writer.session, new.adapter)
        if adapter is not None:
            yield models.Code(
                task=adapter.task,
                generator_id=generator.id,
                adapter_id=adapter.id,
                blob=writer.blob(new.blob),
                bits=new.bits,
                squared_error=new.squared_error,
                effect=new.effect,
                **limit_columns(new.asked),
            )
    # A session forgets rows that nobody holds, and then asks for them one by one.
    in_session.clear()


def limit_columns(asked: records.CodeLimits | None) -> dict[str, float | None]:
    """Return column -> value of the limits that a code was made for."""
    columns = {field: None if asked is None else getattr(asked, field) for field in _LIMITS}
    # `x * x` rather than a power: the root of a product comes back exactly, and so does the limit that was asked for.
    limit = columns.pop("max_error")
    return {
        **columns,
        "max_squared_error": None if limit is None else limit * limit,
        "refined": columns["refined"] or None,
    }


def code_files(session: Session, generator_id: int, *, evicted: bool = False) -> dict[str, CodeFiles]:
    """Return task -> the files that a generator has of it; `evicted`: only where the original was evicted."""
    code, adapter = models.Code, models.Adapter
    query = select(models.Task.name, code.blob_id, code.residual_id, adapter.evicted_at, code.crc, adapter.crc)
    query = query.join_from(code, models.Task).join(adapter, adapter.id == code.adapter_id)
    query = query.where(code.generator_id == generator_id)
    # Not in SQL: a row that is left out is not checked.
    return {
        name: (blob, residual)
        for name, blob, residual, gone, *_ in session.execute(query)
        if gone is not None or not evicted
    }


def restore_hint(generated: Mapping[str, bool]) -> str:
    """Return how to restore evicted tasks, given as name -> whether a generator made the adapter.

    A generated task has no original, but the folder that `icm generate` wrote takes its place.
    """
    made = sorted(name for name, is_generated in generated.items() if is_generated)
    is_one = len(generated) == 1
    if not made:
        return f"run `icm ingest --restore PATH` with the {'folder of its original' if is_one else 'original folders'}"
    if is_one:
        return (
            "run `icm ingest --restore PATH` with the folder that `icm generate` wrote, "
            f"or `icm rm {made[0]}` and generate it again afterwards"
        )
    again = "the folders that `icm generate` wrote, or remove them with `icm rm` and generate them again afterwards"
    if len(made) == len(generated):
        return f"run `icm ingest --restore PATH` with {again}"
    return f"run `icm ingest --restore PATH` with the original folders; for the generated {some(made)}, use {again}"


def restore_hint_of(session: Session, names: Collection[str]) -> str:
    """Return how to restore some evicted tasks of the store."""
    adapter, generated = models.Adapter, dict.fromkeys(names, False)
    for part in in_parts(sorted(names)):
        query = select(models.Task.name, adapter.is_generated, models.Task.crc, adapter.crc)
        query = query.join(adapter, adapter.task_id == models.Task.id).where(models.Task.name.in_(part))
        generated.update(
            (name, is_generated) for name, is_generated, *_ in session.execute(query.where(adapter.is_final))
        )
    return restore_hint(generated)
