"""Training runs and the one checkpoint each can be resumed from."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry import records
from registry import schema as models
from registry.storage.row_writer import RowWriter, existing_adapters
from registry.tables.table import Table
from registry.to_records import record


class Runs(Table):
    """What the store knows of training runs."""

    def running(self, base_model: str) -> records.TrainRunRecord | None:
        """Return the run of a base model that can be resumed, if there is one."""
        with self._db.read() as session:
            row = _running(session, base_model)
            return None if row is None else record(records.TrainRunRecord, row)

    def start(self, base_model: str, config: records.Json) -> records.TrainRunRecord:
        """Begin a run; one of the same base model that was running is given up with its checkpoint."""
        with self._write() as writer:
            session = writer.session
            base = writer.base_model(base_model)
            session.flush()
            earlier = _running(session, base.name)
            garbage = finish_run(writer, earlier.id) if earlier is not None else []
            row = models.TrainRun(base_model=base, state="running", config=dict(config), step=0, created_at=writer.now)
            row.updated_at = writer.now
            session.add(row)
            session.flush()
            made = record(records.TrainRunRecord, row)
        self._drop(garbage)
        return made

    def save_checkpoint(self, run_id: int, *, step: int, weights: bytes, optimizer: bytes) -> records.TrainRunRecord:
        """Store a checkpoint of a running run durably, in place of its earlier one, whose files are deleted.

        Raises:
            LookupError: The run is not running.
        """
        # Bytes first: a row never refers to bytes that are not durable.
        digests = self._blobs.put_all([weights, optimizer])
        with self._write() as writer:
            row = writer.session.get(models.TrainRun, run_id)
            if row is None or row.state != "running":
                raise LookupError(f"train run {run_id} is not running")
            garbage = [blob.digest for blob in (row.weights, row.optimizer) if blob]
            row.weights, row.optimizer = writer.blob(digests[0]), writer.blob(digests[1])
            row.step, row.updated_at = step, writer.now
            writer.session.flush()
            made = record(records.TrainRunRecord, row)
        # What did not change since the last checkpoint is the same blob.
        self._drop(digest for digest in garbage if digest not in digests)
        return made

    def save_codes(self, run_id: int, codes: Iterable[records.RunCode]) -> None:
        """Record codes whose files are durable, each in place of an earlier one, unless the adapter is gone by now."""
        codes = list(codes)
        with self._write() as writer:
            there = existing_adapters(writer.session, [code.adapter for code in codes])
            for code in (code for code in codes if code.adapter in there):
                blob = writer.blob(code.blob)
                writer.session.flush()
                row = models.RunCode(run_id=run_id, adapter_id=code.adapter, blob_id=blob.id, generator=code.generator)
                row.squared_error, row.initial_is_known = code.squared_error, code.initial_is_known
                writer.session.merge(row)

    def codes(self, run_id: int, generator: str) -> list[records.RunCode]:
        """Return the codes that a run has made under the network of this generator file."""
        code = models.RunCode
        with self._db.read() as session:
            rows = session.scalars(select(code).where(code.run_id == run_id, code.generator == generator))
            return [record(records.RunCode, row, adapter=row.adapter_id, size=row.blob.size) for row in rows]


def _running(session: Session, base_model: str) -> models.TrainRun | None:
    query = select(models.TrainRun).join(models.TrainRun.base_model)
    return session.scalar(query.where(models.BaseModel.name == base_model, models.TrainRun.state == "running"))


def finish_run(writer: RowWriter, run_id: int) -> list[str]:
    """Mark a run as done in an open transaction; return what may be garbage then. `LookupError` if it is gone."""
    row = writer.session.get(models.TrainRun, run_id)
    if row is None:
        raise LookupError(f"there is no train run {run_id}")
    codes = select(models.RunCode).where(models.RunCode.run_id == run_id)
    garbage = [blob.digest for blob in (row.weights, row.optimizer) if blob]
    garbage += [code.blob.digest for code in writer.session.scalars(codes)]
    writer.session.execute(delete(models.RunCode).where(models.RunCode.run_id == run_id))
    row.state, row.weights, row.optimizer, row.updated_at = "done", None, None, writer.now
    writer.session.flush()
    return garbage
