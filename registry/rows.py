"""Where an adapter came from, in as few bytes as a trainer's habits allow.

A trainer puts a task's adapter into one folder and its checkpoints into `checkpoint-N` below. So the folder is kept
once per task, and a source only where it is another one.

Rows that others refer to, made when they are new. One writer serves one transaction.

Rows that many others refer to, found or made many at a time, and known by their numbers.

An ingest refers to hundreds of blobs. With an object for each row, and statements that fetch it back, this took ten
times longer; so here are plain statements, and the number of a row is all that is kept of it.

From table rows to records.

Rows of codes in an open transaction: whether what was encoded is still the task's adapter, and what is written then.

A code is made of an adapter that was read minutes ago. Meanwhile another ingest may have replaced it, and the number of
a row that went is given to the next one. So the bytes are compared, not only the number.

What task vectors and measurements are of, and whether their task still has it when they are recorded.

Both are made of what was read minutes ago. Meanwhile another process may have replaced the adapter, its samples or its
code, and what is recorded for a task speaks for what the task has from then on. So it is compared in the transaction.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Table, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import Session

from registry import records
from registry import schema as models
from registry.blobs.content import Blobs
from registry.errors import TaskNotFound
from registry.records import Description
from registry.schema import BaseModel, Blob, Document, compact_json

_CHECKPOINT = re.compile(r"/checkpoint-[0-9]+$")


def source_label(path: Path) -> str:
    """Return a path as text that every database takes: bytes that are no UTF-8 are written out in hexadecimal."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def task_folder(source: str) -> str:
    """Return the folder of a task whose final adapter came from `source`, which may be a checkpoint itself."""
    return _CHECKPOINT.sub("", source)


def usual_source(folder: str, step: int | None, *, is_final: bool) -> str:
    """Return where a trainer would have put an adapter of a task."""
    return folder if is_final or step is None else f"{folder}/checkpoint-{step}"


def unusual_source(source: str, folder: str, step: int | None, *, is_final: bool) -> str | None:
    """Return a source if it has to be kept, because it is not the usual one."""
    return None if source == usual_source(folder, step, is_final=is_final) else source


MAX_VARIABLES = 500  # SQLite's own limit on `IN (...)` was 999 for long


class RowWriter:
    """Finds or makes the rows of blobs and base models in an open transaction."""

    def __init__(self, session: Session, blobs: Blobs) -> None:
        self.session = session
        self.now = utc_now()
        self._files = blobs
        self._blobs: dict[str, Blob | None] = {}  # None: looked for, has no row yet
        self._base_models: dict[str, BaseModel] = {}

    def blob(self, digest: str) -> Blob:
        """Return the row of a blob.

        Raises:
            MissingBlob: the store does not have its bytes.
        """
        row = self.absent_blob(digest, size := self._files.size(digest))
        row.size = size  # a bundle may have said something else of bytes that were not here
        return row

    def absent_blob(self, digest: str, size: int) -> Blob:
        """Return the row of a blob that this store need not hold, because only evicted adapters refer to it."""
        if digest not in self._blobs:
            self.load_blobs([digest])
        row = self._blobs[digest]
        if row is None:
            row = self._blobs[digest] = Blob(digest=digest, size=size)
            self.session.add(row)
        return row

    def load_blobs(self, digests: Iterable[str]) -> None:
        """Fetch the rows of many blobs in few queries, before :meth:`blob` is called for each."""
        wanted = sorted(set(digests) - self._blobs.keys())
        for at in range(0, len(wanted), MAX_VARIABLES):
            some = wanted[at : at + MAX_VARIABLES]
            self._blobs |= dict.fromkeys(some)
            query = select(Blob).where(Blob.digest.in_(some))
            self._blobs |= {row.digest: row for row in self.session.scalars(query)}

    def base_model(self, name: str) -> BaseModel:
        """Return the row of a base model."""
        if name not in self._base_models:
            row = self.session.scalar(select(BaseModel).where(BaseModel.name == name))
            self._base_models[name] = row or BaseModel(name=name)
            self.session.add(self._base_models[name])
        return self._base_models[name]


def named_blob(session: Session, digest: str) -> Blob:
    """Find or make the row of a blob that is only named, in an open transaction: its length is not known here."""
    row = session.scalar(select(Blob).where(Blob.digest == digest))
    if row is None:
        row = Blob(digest=digest, size=0)
        session.add(row)
        session.flush()
    return row


def document_row(session: Session, body: object) -> Document:
    """Find or make the row of a JSON value in an open transaction."""
    digest = document_digest(body)
    row = session.scalar(select(Document).where(Document.digest == digest))
    if row is None:
        row = Document(digest=digest, body=body)
        session.add(row)
        session.flush()
    return row


def document_digest(body: object) -> str:
    """Return what a JSON value is known by."""
    return hashlib.sha256(compact_json(body).encode()).hexdigest()


def utc_now() -> str:
    """Return the present time as RFC 3339 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


T = TypeVar("T")


def table_of(model: type[models.Base]) -> Table:
    """Return the table behind a class."""
    return cast(Table, model.__table__)


def in_parts(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Split values into parts that one statement takes as variables."""
    for at in range(0, len(values), MAX_VARIABLES):
        yield values[at : at + MAX_VARIABLES]


class RowNumbers:
    """Finds or makes the rows of blobs, JSON values and base models in an open transaction."""

    def __init__(self, connection: Connection, files: Blobs) -> None:
        self._connection = connection
        self._files = files

    def blobs(self, digests: Iterable[str]) -> dict[str, int]:
        """Return digest -> number.

        The files are looked for under the write lock, so no row is ever committed whose bytes another process has
        removed.

        Raises:
            MissingBlob: there is no such file.
        """
        rows = {digest: {"size": self._files.size(digest)} for digest in sorted(set(digests))}
        # An imported bundle may have said something else of the size of bytes that were not here.
        return self._numbers(table_of(models.Blob), "digest", rows, corrected="size")

    def documents(self, bodies: Iterable[T]) -> dict[T, int]:
        """Return JSON value -> number; the values are given in a form that can be a key, such as tuples."""
        digests = {body: document_digest(body) for body in dict.fromkeys(bodies)}
        rows = {digest: {"body": body} for body, digest in digests.items()}
        numbers = self._numbers(table_of(models.Document), "digest", rows)
        return {body: numbers[digest] for body, digest in digests.items()}

    def base_models(self, names: Iterable[str]) -> dict[str, int]:
        """Return name -> number."""
        return self._numbers(table_of(models.BaseModel), "name", {name: {} for name in sorted(set(names))})

    def _numbers(
        self, table: Table, key: str, rows: Mapping[str, Mapping[str, Any]], *, corrected: str | None = None
    ) -> dict[str, int]:
        """Insert those rows whose key the table lacks, correct one column of the others, return every row's number."""
        if not rows:
            return {}
        statement = insert(table)
        if corrected is None:
            statement = statement.on_conflict_do_nothing(index_elements=[key])
        else:
            new = statement.excluded[corrected]
            changes = table.c[corrected] != new
            statement = statement.on_conflict_do_update(index_elements=[key], set_={corrected: new}, where=changes)
        self._connection.execute(statement, [{key: name, **values} for name, values in rows.items()])
        found: dict[str, int] = {}
        for names in in_parts(list(rows)):
            query = select(table.c[key], table.c.id).where(table.c[key].in_(names))
            found |= {row[0]: row[1] for row in self._connection.execute(query)}
        return found


def find_task(session: Session, name: str) -> models.Task:
    """Return a task by name, in any case.

    Raises:
        TaskNotFound: there is none; the error holds the closest names.
    """
    task = session.scalar(select(models.Task).where(models.Task.name == name))
    if task is None:
        names = {found.lower(): found for found in session.scalars(select(models.Task.name))}
        close = difflib.get_close_matches(name.lower(), names, n=3)
        raise TaskNotFound(name, tuple(names[match] for match in close))
    return task


def find_final(session: Session, task_id: int) -> models.Adapter | None:
    """Return the final adapter of a task; only a damaged store has a task without one."""
    adapter = models.Adapter
    return session.scalar(select(adapter).where(adapter.task_id == task_id, adapter.is_final))


def final_if_unchanged(session: Session, seen: records.AdapterRecord) -> models.Adapter | None:
    """Return the row of an adapter that was encoded or measured; None if its task has another one by now, or is gone.

    The digests are compared, not only the row's number: the number of a deleted row is given to the next one.
    """
    task = session.scalar(select(models.Task).where(models.Task.name == seen.task))
    final = None if task is None else find_final(session, task.id)
    if final is None or (final.id, final.weights.digest, final.config.digest) != (seen.id, seen.weights, seen.config):
        return None
    return final


def task_record(row: models.Task) -> records.TaskRecord:
    """Return the record of a task."""
    return records.TaskRecord(
        id=row.id,
        name=row.name,
        base_model=row.base_model.name,
        samples=_digest(row.samples),
        eval_data=_digest(row.eval_data),
        created_at=row.created_at,
        pinned=row.pinned,
    )


def adapter_record(row: models.Adapter) -> records.AdapterRecord:
    """Return the record of an adapter."""
    description = Description(*row.description.body)
    return records.AdapterRecord(
        id=row.id,
        task=row.task.name,
        step=row.step,
        is_final=row.is_final,
        weights=row.weights.digest,
        config=row.config.digest,
        card=_digest(row.card),
        dtype=description.dtype,
        rank_max=description.rank_max,
        parameters=description.parameters,
        target_modules=tuple(description.target_modules),
        layout=tuple((name, rank, inputs, outputs) for name, rank, inputs, outputs in description.layout),
        source=_source(row),
        format=description.format,
        original_bytes=row.weights.size + row.config.size + (row.card.size if row.card else 0),
        weights_bytes=row.weights.size,
        created_at=row.created_at,
        evicted_at=row.evicted_at,
        is_generated=row.is_generated,
    )


def vector_record(row: models.TaskVector) -> records.VectorRecord:
    """Return the record of a task vector."""
    return records.VectorRecord(
        id=row.id,
        task=row.task.name,
        view=cast(records.View, row.view),
        support_set=row.support_set,
        extractor=row.extractor.body,
        blob=row.blob.digest,
        dim=row.dim,
    )


def code_record(row: models.Code) -> records.CodeRecord:
    """Return the record of a code."""
    return records.CodeRecord(
        id=row.id,
        task=row.task.name,
        adapter_id=row.adapter_id,
        generator_id=row.generator_id,
        blob=row.blob.digest,
        size=row.blob.size,
        bits=row.bits,
        dw_error=row.dw_error,
        asked=_asked(row),
        residual=_residual(row),
    )


def generator_record(row: models.Generator) -> records.GeneratorRecord:
    """Return the record of a generator."""
    return records.GeneratorRecord(
        id=row.id,
        base_model=row.base_model.name,
        version=row.version,
        parent_id=row.parent_id,
        blob=row.blob.digest,
        size=row.blob.size,
        config=row.config,
        metrics=row.metrics,
        is_current=row.is_current,
        created_at=row.created_at,
        start=None if row.start is None else row.start.digest,
        start_size=0 if row.start is None else row.start.size,
    )


def train_run_record(row: models.TrainRun) -> records.TrainRunRecord:
    """Return the record of a training run."""
    return records.TrainRunRecord(
        id=row.id,
        base_model=row.base_model.name,
        state=cast(Any, row.state),
        config=row.config,
        step=row.step,
        weights=_digest(row.weights),
        optimizer=_digest(row.optimizer),
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def evaluation_record(row: models.Evaluation) -> records.EvaluationRecord:
    """Return the record of a measurement."""
    return records.EvaluationRecord(
        id=row.id,
        task=row.task.name,
        rung=cast(records.Rung, row.rung),
        generator_id=row.generator_id,
        data=row.data.digest,
        metric=row.metric,
        nats_per_token=row.nats_per_token,
        tokens=row.tokens,
        utf8_bytes=row.utf8_bytes,
        retained_gain=row.retained_gain,
        dw_error=row.dw_error,
        settings=row.settings.body,
        created_at=row.created_at,
    )


def _residual(row: models.Code) -> records.ResidualRecord | None:
    if row.residual is None or row.residual_error is None:
        return None
    return records.ResidualRecord(row.residual.digest, row.residual_error, row.residual.size)


def _asked(row: models.Code) -> records.Asked | None:
    if row.is_kept is None:
        return None
    return records.Asked(row.min_gain, row.max_error, row.tolerance, row.is_kept, row.refined or 0)


def _source(row: models.Adapter) -> str:
    return usual_source(row.task.folder, row.step, is_final=row.is_final) if row.source is None else row.source


def _digest(blob: models.Blob | None) -> str | None:
    return None if blob is None else blob.digest
