"""Rows of codes in an open transaction: whether what was encoded is still the task's adapter, and what is written then.

A code is made of an adapter that was read minutes ago. Meanwhile another ingest may have replaced it, and the number of
a row that went is given to the next one. So the bytes are compared, not only the number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields

from sqlalchemy.orm import Session

from registry import models, records, rows
from registry.blobs import Spare
from registry.errors import CodeChanged, GeneratorConflict, TaskNotFound
from registry.writer import RowWriter

_ASKED = tuple(field.name for field in fields(records.Asked))


def current_row(session: Session, generator_id: int | None) -> models.Generator:
    """Return the row of a generator.

    Raises:
        GeneratorConflict: it is not the current one of its base model (any more).
    """
    row = None if generator_id is None else session.get(models.Generator, generator_id)
    if row is None or not row.is_current:
        fact = "another icm made another generator current meanwhile"
        raise GeneratorConflict(fact, hint="run the same command again")
    return row


def encoded_row(session: Session, encoded: records.AdapterRecord) -> models.Adapter:
    """Return the row of an adapter that was encoded.

    Raises:
        TaskNotFound: there is no such task (any more).
        CodeChanged: it is not the final adapter of its task any more.
    """
    task = rows.find_task(session, encoded.task)
    final = rows.find_final(session, task.id)
    wanted = encoded.id, encoded.weights, encoded.config
    if final is None or (final.id, final.weights.digest, final.config.digest) != wanted:
        raise CodeChanged(f"task {task.name!r} got another adapter meanwhile", hint="run the same command again")
    return final


def code_rows(
    writer: RowWriter, generator: models.Generator, codes: Sequence[records.NewCode]
) -> Iterator[models.Code]:
    """Make the rows of codes whose adapter is still that of its task, and none of the others.

    Args:
        writer: Of the open transaction.
        generator: Under which they were made; its row is flushed by then.
        codes: What was made.
    """
    writer.session.flush()
    for new in codes:
        try:
            adapter = encoded_row(writer.session, new.adapter)
        except (TaskNotFound, CodeChanged):
            continue
        yield models.Code(
            task=adapter.task,
            generator_id=generator.id,
            adapter_id=adapter.id,
            blob=writer.blob(new.blob),
            bits=new.bits,
            dw_error=new.dw_error,
            **asked_columns(new.asked),
        )


def spare_of(new: Iterable[records.NewCode | records.NewResidual]) -> Spare:
    """Return what gives the bytes of what is to be recorded, as far as they are held."""
    return {one.blob: one.data for one in new if one.data is not None}.get


def asked_columns(asked: records.Asked | None) -> dict[str, float | None]:
    """Return column -> value of what a code was asked to keep."""
    columns = {field: None if asked is None else getattr(asked, field) for field in _ASKED}
    return {**columns, "refined": columns["refined"] or None}
