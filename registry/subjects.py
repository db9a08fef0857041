"""What task vectors and measurements are of, and whether their task still has it when they are recorded.

Both are made of what was read minutes ago. Meanwhile another process may have replaced the adapter, its samples or its
code, and what is recorded for a task speaks for what the task has from then on. So it is compared in the transaction.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import models, records, rows
from registry.code_rows import encoded_row
from registry.errors import CodeChanged, TaskNotFound


@dataclass(frozen=True)
class Subject:
    """What is measured of a task, as it was read.

    Attributes:
        final: its final adapter.
        generator: the generator of the rungs `residual`, `code` and `generate`; it need not be current any more.
        code: the task's code under it, with its residual.
    """

    final: records.AdapterRecord
    generator: records.GeneratorRecord | None
    code: records.CodeRecord | None


def must_be_unchanged(session: Session, seen: records.TaskSummary) -> None:
    """Raise unless a task has the very adapter and samples that it had.

    Raises:
        TaskNotFound: there is no such task (any more).
        CodeChanged: it has another adapter, or other samples.
    """
    task = encoded_row(session, seen.final).task
    if rows.task_record(task).samples != seen.task.samples:
        raise CodeChanged(f"task {task.name!r} got other samples meanwhile", hint="run the same command again")


def is_of_present(session: Session, new: records.NewEvaluation, of: Subject) -> bool:
    """Say whether what was measured is what the task has now; of the base model that is always so."""
    if new.rung == "base":
        return True
    try:
        task = encoded_row(session, of.final).task
    except (TaskNotFound, CodeChanged):
        return False
    if new.rung == "original":
        return True
    generator = None if of.generator is None else session.get(models.Generator, of.generator.id)
    if of.generator is None or generator is None or generator.blob.digest != of.generator.blob:
        return False
    return new.rung == "generate" or _is_present_code(session, task, generator, of.code)


def _is_present_code(
    session: Session, task: models.Task, generator: models.Generator, seen: records.CodeRecord | None
) -> bool:
    code = models.Code
    row = session.scalar(select(code).where(code.task_id == task.id, code.generator_id == generator.id))
    return row is not None and seen is not None and _files(rows.code_record(row)) == _files(seen)


def _files(code: records.CodeRecord) -> tuple[str, str | None]:
    return code.blob, None if code.residual is None else code.residual.blob
