"""From table rows to records.

A record has the fields of its row under the same names. A blob becomes its digest, a document its JSON value, a task or
base model its name; what a record has in addition is given by name.

The source of an adapter takes few bytes: a trainer puts a task's adapter into one folder and its checkpoints into
`checkpoint-N` below it. So a task stores the folder once, and an adapter stores its source only if it is another one.
"""

from __future__ import annotations

import re
from dataclasses import fields
from functools import lru_cache
from typing import Any, TypeVar, cast

from registry import records
from registry import schema as models
from registry.names import NLL, UNKNOWN_BASE
from registry.records import WITHOUT_BASE
from registry.row_checks import WrongRow

Record = TypeVar("Record")

_CHECKPOINT = re.compile(r"/checkpoint-[0-9]+$")


def task_record(row: models.Task) -> records.TaskRecord:
    """Return the record of a task."""
    return record(records.TaskRecord, row)


def adapter_record(row: models.Adapter) -> records.AdapterRecord:
    """Return the record of an adapter; raise `WrongRow` if an extra of it is missing."""
    if len(row.extras) != row.extra_count:
        raise WrongRow(f"task {row.task.name!r} has {len(row.extras)} extras, but {row.extra_count} were recorded")
    common = _description(row.description)
    if common.original_only is None and row.task.base_model.name == UNKNOWN_BASE:
        common = common._replace(original_only=WITHOUT_BASE)
    usual = usual_source(row.task.folder, row.step, is_final=row.is_final)
    extras = (records.Extra(one.blob.digest, one.file or None, one.size, one.blob.size) for one in row.extras)
    return record(
        records.AdapterRecord,
        row,
        **common._asdict(),
        source=usual if row.source is None else row.source,
        # By content: the numbers of blobs depend on what else was stored, and when.
        extras=tuple(sorted(extras, key=lambda extra: (extra.file or "", extra.blob))),
        original_bytes=row.weights.size + row.config.size + (row.card.size if row.card else 0),
        weights_bytes=row.weights.size,
        initial_bytes=row.initial.size if row.initial else 0,
    )


# Adapters with the same description share it in memory too: a layout may name a thousand modules.
@lru_cache(maxsize=64)
def _description(row: models.Document) -> records.Description:
    return records.read_description(row.body)


def code_record(row: models.Code) -> records.CodeRecord:
    """Return the record of a code."""
    claim = None if row.claim is None or row.squared_error is not None else records.Claim(**row.claim)
    more = {"asked": _limits(row), "residual": _residual(row), "claim": claim}
    return record(records.CodeRecord, row, size=row.blob.size, **more)


def generator_record(row: models.Generator) -> records.GeneratorRecord:
    """Return the record of a generator."""
    start_size = 0 if row.start is None else row.start.size
    return record(records.GeneratorRecord, row, size=row.blob.size, start_size=start_size)


def evaluation_record(row: models.Evaluation) -> records.EvaluationRecord:
    """Return the record of a measurement."""
    score = row.score or {"metric": NLL, "others": {}}
    return record(records.EvaluationRecord, row, metric=score["metric"], others=score["others"])


def record(kind: type[Record], row: models.Base, **more: object) -> Record:
    """Return the record of a row: what `more` does not name comes from the fields of the same names."""
    loaded = vars(row)  # SQLAlchemy's way to an attribute takes ten times longer
    names = (name for name in _names(cast(Any, kind)) if name not in more)
    values = {name: _value(loaded[name] if name in loaded else getattr(row, name)) for name in names}
    return kind(**more, **values)


@lru_cache
def _names(kind: type[object]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cast(Any, kind)))


_SHOWN: dict[type, str] = {
    models.Blob: "digest",
    models.Document: "body",
    models.Task: "name",
    models.BaseModel: "name",
}


def _value(value: Any) -> Any:
    shown = _SHOWN.get(type(value))
    return value if shown is None else getattr(value, shown)


def _residual(row: models.Code) -> records.ResidualRecord | None:
    if row.residual is None or row.residual_squared_error is None:
        return None
    return records.ResidualRecord(row.residual.digest, row.residual_squared_error, row.residual.size)


def _limits(row: models.Code) -> records.CodeLimits | None:
    if row.is_kept is None:
        return None
    max_error = records.relative_error(row.max_squared_error)
    steps, size, keep = row.refined or 0, row.max_size, row.keep
    return records.CodeLimits(row.min_gain, max_error, row.tolerance, row.is_kept, steps, size, keep)


def task_folder(source: str) -> str:
    """Return the folder of a task whose final adapter came from `source`, which may be a checkpoint itself."""
    return _CHECKPOINT.sub("", source)


def usual_source(folder: str, step: int | None, *, is_final: bool) -> str:
    """Return where a trainer would have put an adapter of a task."""
    return folder if is_final or step is None else f"{folder}/checkpoint-{step}"


def unusual_source(source: str, folder: str, step: int | None, *, is_final: bool) -> str | None:
    """Return a source if it has to be stored, because it is not the usual one."""
    return None if source == usual_source(folder, step, is_final=is_final) else source
