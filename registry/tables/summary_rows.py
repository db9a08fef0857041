"""What a listing shows of tasks, read as columns: an object for each row takes ten times as long to make.

    numbers of tasks ──▶ tasks, final adapters, codes, gains ──▶ a `TaskSummary` each

The database joins and counts, and only values come back. Nothing is checked while they are read: `check` looks at all
rows that some tasks have and refer to, `Columns.are_right` at all there are.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

from registry import records, values
from registry.errors import DamagedStore
from registry.names import UNKNOWN_BASE
from registry.records import WITHOUT_BASE, Description, TaskSummary, read_description
from registry.row_checks import WrongRow
from registry.storage.database import Columns
from registry.values import DIGEST, MOMENT, PACKED, RUNGS, WORDS

# In each statement, {of} is a list of numbers of tasks.
_TASKS = """
SELECT tasks.id, tasks.name, base_models.name, samples.digest, texts.digest, tasks.created_at, pinned, tags, note
FROM tasks JOIN base_models ON base_models.id = base_model_id
LEFT JOIN blobs AS samples ON samples.id = samples_id LEFT JOIN blobs AS texts ON texts.id = eval_id
WHERE tasks.id IN ({of})"""
_COUNTS = """
SELECT id, (SELECT count(*) FROM adapters WHERE task_id = tasks.id AND NOT is_final AND evicted_at IS NULL),
    (SELECT count(*) FROM adapters WHERE task_id = tasks.id AND NOT is_final AND evicted_at IS NOT NULL),
    (SELECT count(*) FROM task_vectors WHERE task_id = tasks.id)
FROM tasks WHERE id IN ({of})"""
_FINALS = """
SELECT task_id, adapters.id, tasks.folder, description_id, weights.digest, weights.size, config.digest, config.size,
    card.digest, card.size, initial.digest, initial.size, step, source, adapters.created_at, evicted_at, is_generated,
    tensors_key, extra_count
FROM adapters JOIN tasks ON tasks.id = task_id
JOIN blobs AS weights ON weights.id = weights_id JOIN blobs AS config ON config.id = config_id
LEFT JOIN blobs AS card ON card.id = card_id LEFT JOIN blobs AS initial ON initial.id = initial_id
WHERE task_id IN ({of}) AND is_final"""
_FIGURES = """
SELECT tasks.id, tasks.name, base_models.name, adapters.id, description_id, weights.size,
    weights.size + config.size + coalesce(card.size, 0), evicted_at IS NOT NULL, extra_count, code.size,
    residual.size, dw_error, residual_error, effect, claim IS NOT NULL, min_gain, max_error, tolerance, is_kept,
    refined, max_size, keep
FROM tasks JOIN base_models ON base_models.id = base_model_id
LEFT JOIN adapters ON adapters.task_id = tasks.id AND is_final
LEFT JOIN blobs AS weights ON weights.id = weights_id LEFT JOIN blobs AS config ON config.id = config_id
LEFT JOIN blobs AS card ON card.id = card_id
LEFT JOIN codes ON codes.task_id = tasks.id AND generator_id IN (SELECT id FROM generators WHERE is_current)
LEFT JOIN blobs AS code ON code.id = codes.blob_id LEFT JOIN blobs AS residual ON residual.id = residual_id
WHERE tasks.id IN ({of})"""
_EXTRAS = """
SELECT adapter_id, blobs.digest, file, extras.size, blobs.size
FROM extras JOIN blobs ON blobs.id = blob_id JOIN adapters ON adapters.id = adapter_id
WHERE task_id IN ({of}) AND is_final"""
_CODES = """
SELECT task_id, codes.id, adapter_id, generator_id, code.digest, code.size, bits, dw_error, residual.digest,
    residual.size, residual_error, min_gain, max_error, tolerance, is_kept, refined, max_size, keep, claim, effect
FROM codes JOIN blobs AS code ON code.id = blob_id LEFT JOIN blobs AS residual ON residual.id = residual_id
WHERE task_id IN ({of}) AND generator_id IN (SELECT id FROM generators WHERE is_current)"""
# As `evaluations.latest`: on the task's own text, else the latest on any; one with a gain if there is one.
_GAINS = f"""
SELECT codes.task_id, retained_gain, settings_id
FROM codes JOIN evaluations ON evaluations.id = (
    SELECT own.id FROM evaluations AS own JOIN tasks ON tasks.id = own.task_id
    WHERE own.task_id = codes.task_id AND own.generator_id = codes.generator_id
        AND rung = CASE WHEN residual_id IS NULL THEN {RUNGS.index("code")} ELSE {RUNGS.index("residual")} END
    ORDER BY coalesce(data_id = eval_id, FALSE) DESC, retained_gain IS NOT NULL DESC, own.id DESC LIMIT 1)
WHERE codes.task_id IN ({{of}}) AND codes.generator_id IN (SELECT id FROM generators WHERE is_current)"""  # noqa: S608
_VECTORS = """
SELECT tasks.name, view, support_set, extractor_id, blobs.digest, dim, task_vectors.id
FROM task_vectors JOIN tasks ON tasks.id = task_id JOIN blobs ON blobs.id = blob_id
WHERE {own} ORDER BY {name}, extractor_id, view, support_set"""
_VECTOR_FILES = """
SELECT task_id, digest
FROM (SELECT DISTINCT task_id, blob_id FROM task_vectors) AS own JOIN blobs ON blobs.id = blob_id"""
# A row without a check is damaged, so nothing that is derived from it has this stamp.
_STAMPED = (
    "SELECT coalesce(crc, 0) FROM task_vectors ORDER BY task_id, view, support_set, extractor_id",
    "SELECT coalesce(crc, 0) FROM tasks ORDER BY id",
    "SELECT coalesce(crc, 0) FROM base_models ORDER BY id",
    "SELECT coalesce(crc, 0) FROM documents ORDER BY id",
    "SELECT coalesce(crc, 0) FROM blobs WHERE id IN (SELECT blob_id FROM task_vectors) ORDER BY id",
)
_GENERATOR = """
SELECT generators.id, base_models.name, version, parent_id, file.digest, file.size, config, metrics,
    generators.created_at, start.digest, start.size
FROM generators JOIN base_models ON base_models.id = base_model_id JOIN blobs AS file ON file.id = blob_id
LEFT JOIN blobs AS start ON start.id = start_id WHERE base_models.name = ? AND is_current"""
_VIEW = values.choice(*values.VIEWS)
_BLOBS = {
    "tasks": ("id", "samples_id", "eval_id"),
    "adapters": ("task_id", "weights_id", "config_id", "card_id", "initial_id"),
    "codes": ("task_id", "blob_id", "residual_id"),
    "task_vectors": ("task_id", "blob_id"),
}
_OF_ADAPTERS = "adapter_id IN (SELECT id FROM adapters WHERE task_id IN ({of}))"
_FILES = [
    f"SELECT {column} FROM {table} WHERE {task} IN ({{of}})"  # noqa: S608
    for table, (task, *others) in _BLOBS.items()
    for column in others
]
_FILES.append(f"SELECT blob_id FROM extras WHERE {_OF_ADAPTERS}")  # noqa: S608
# Table -> the rows that some tasks have there or refer to.
_CHECKED = {
    "base_models": "TRUE",
    "generators": "TRUE",
    "tasks": "id IN ({of})",
    **dict.fromkeys(("adapters", "task_vectors", "codes", "evaluations"), "task_id IN ({of})"),
    "extras": _OF_ADAPTERS,
    "documents": """id IN (SELECT description_id FROM adapters WHERE task_id IN ({of})
        UNION SELECT settings_id FROM evaluations WHERE task_id IN ({of}))""",
    "blobs": f"id IN ({' UNION '.join(_FILES)})",
}
_CHECKED_OF_TASKS = {
    "base_models": "TRUE",
    "tasks": "id IN ({of})",
    "blobs": """id IN (SELECT samples_id FROM tasks WHERE id IN ({of})
        UNION SELECT eval_id FROM tasks WHERE id IN ({of}))""",
}


def check(columns: Columns, numbers: Sequence[int], tables: Mapping[str, str] = _CHECKED) -> None:
    """Raise `WrongRow` if a row that tasks have, or that one of these refers to, is not as it was written."""
    of = _listed(numbers)
    for table, rows in tables.items():
        check_rows(columns, table, rows.format(of=of))


def check_rows(columns: Columns, table: str, condition: str) -> None:
    """Raise `WrongRow` if one of the rows of a table that a condition holds for is not as it was written."""
    fact = columns.first_wrong(table, condition)
    if fact is not None:
        raise WrongRow(fact)


def names(columns: Columns, numbers: Sequence[int]) -> list[str]:
    """Return the names of tasks, in their order; those that are gone are left out."""
    of = _listed(numbers)
    check_rows(columns, "tasks", f"id IN ({of})")
    name_of: dict[int, str] = dict(columns.execute(f"SELECT id, name FROM tasks WHERE id IN ({of})"))  # noqa: S608
    return [name_of[number] for number in numbers if number in name_of]


def tasks(columns: Columns, numbers: Sequence[int]) -> list[records.TaskRecord]:
    """Return tasks, in their order, once their rows are known to be right; those that are gone are left out."""
    check(columns, numbers, _CHECKED_OF_TASKS)
    return list(_tasks(columns, numbers).values())


def summaries(columns: Columns, numbers: Sequence[int]) -> list[TaskSummary]:
    """Return tasks with what a listing shows of them, in their order; those that are gone are left out.

    Raises:
        DamagedStore: A task has no final adapter.
        WrongRow: An extra of one is missing.
        UnreadableValue: A value is none that icm wrote.
    """
    of, found = _listed(numbers), _tasks(columns, numbers)
    counts = {row[0]: row[1:] for row in columns.execute(_COUNTS.format(of=of))}
    codes = {row[0]: _code(found[row[0]].name, *row[1:]) for row in columns.execute(_CODES.format(of=of))}
    finals = {row[0]: row[1:] for row in columns.execute(_FINALS.format(of=of))}
    gains = {row[0]: row[1:] for row in columns.execute(_GAINS.format(of=of))}
    documents = _documents(columns, {row[2] for row in finals.values()} | {how for _, how in gains.values()})
    extras = _extras(columns, of)
    if lost := [task.name for number, task in found.items() if number not in finals]:
        raise _lost(lost[0])
    made = []
    for number, task in found.items():
        kept, evicted, vectors = counts[number]
        gain, precision = _gain(documents, *gains.get(number, (None, None)))
        final = _final(task, documents, extras, *finals[number])
        made.append(TaskSummary(task, final, kept, evicted, vectors, codes.get(number), gain, precision))
    return made


def figures(columns: Columns, numbers: Sequence[int]) -> list[records.TaskFigures]:
    """Return what a bill says of tasks, in their order; raises as `summaries`."""
    of = _listed(numbers)
    found = {row[0]: row[1:] for row in columns.execute(_FIGURES.format(of=of))}
    gains = {row[0]: row[1:] for row in columns.execute(_GAINS.format(of=of))}
    documents = _documents(columns, {row[3] for row in found.values()} | {how for _, how in gains.values()})
    extras = _extras(columns, of)
    return [
        _figures(number, *_gain(documents, *gains.get(number, (None, None))), documents, extras, *found[number])
        for number in numbers
        if number in found
    ]


def generator(columns: Columns, base_model: str) -> records.GeneratorRecord | None:
    """Return the current generator of a base model, if it has one."""
    row = columns.execute(_GENERATOR, (base_model,)).fetchone()
    if row is None:
        return None
    number, name, version, parent, file, size, config, metrics, created_at, start, start_size = row
    return records.GeneratorRecord(
        number,
        name,
        version,
        parent,
        DIGEST.read(file),
        size,
        PACKED.read(config),
        PACKED.read(metrics),
        True,
        MOMENT.read(created_at),
        DIGEST.read(start),
        start_size or 0,
    )


def vectors(columns: Columns, task: int | None) -> Iterator[records.VectorRecord]:
    """Yield the vectors of all tasks, or of one, once their rows are known to be right."""
    own = "TRUE" if task is None else f"task_id = {task:d}"
    check_rows(columns, "task_vectors", own)
    for table, column in {"tasks": "task_id", "blobs": "blob_id", "documents": "extractor_id"}.items():
        check_rows(columns, table, f"id IN (SELECT {column} FROM task_vectors WHERE {own})")  # noqa: S608
    rows = list(columns.stream(_VECTORS.format(own=own, name=columns.in_any_case("tasks.name"))))
    documents = _documents(columns, {row[3] for row in rows})
    for name, view, support_set, extractor, blob, dim, number in rows:
        made_by = PACKED.read(documents[extractor])
        yield records.VectorRecord(name, _VIEW.read(view), support_set, made_by, DIGEST.read(blob), dim, number)


def vector_files(columns: Columns) -> dict[int, list[str]]:
    """Return number of a task -> the digests of the files of its vectors, for those that have some."""
    found = defaultdict[int, list[str]](list)
    for number, digest in columns.stream(_VECTOR_FILES):
        found[number].append(DIGEST.read(digest))
    return found


def vectors_stamp(columns: Columns) -> str:
    """Return a digest of the checks of all rows that vectors have and refer to, but for those of samples and texts."""
    digest = hashlib.sha256()
    for query in _STAMPED:
        checks = array("q", chain.from_iterable(columns.stream(query)))
        digest.update(len(checks).to_bytes(8) + checks.tobytes())
    return digest.hexdigest()


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers)) or "NULL"  # which is no row's number


def _documents(columns: Columns, numbers: set[int]) -> dict[int, bytes]:
    """Return the bodies of documents, each once: many rows share one."""
    of = _listed(sorted(numbers))
    return dict(columns.execute(f"SELECT id, body FROM documents WHERE id IN ({of})"))  # noqa: S608


def _extras(columns: Columns, of: str) -> Mapping[int, Sequence[records.Extra]]:
    """Return adapter -> its extras, for the final adapters of tasks."""
    found = defaultdict[int, list[records.Extra]](list)
    for adapter, digest, file, size, packed in columns.execute(_EXTRAS.format(of=of)):
        found[adapter].append(records.Extra(DIGEST.read(digest), file or None, size, packed))
    return found


def _extras_of(task: str, own: Sequence[records.Extra], count: int) -> tuple[records.Extra, ...]:
    if len(own) != count:
        raise WrongRow(f"task {task!r} has {len(own)} extras, but {count} were recorded")
    # By content: the numbers of blobs depend on what else was stored, and when.
    return tuple(sorted(own, key=lambda extra: (extra.file or "", extra.blob))) if own else ()


def _lost(task: str) -> DamagedStore:
    return DamagedStore(f"task {task!r} has no final adapter", hint="remove the task with `icm rm` and ingest it again")


def _why_original_only(common: Description, base_model: str) -> str | None:
    return WITHOUT_BASE if common.original_only is None and base_model == UNKNOWN_BASE else common.original_only


# Adapters with the same description share it in memory too: a layout may name a thousand modules.
@lru_cache(maxsize=64)
def _description(body: bytes) -> Description:
    return read_description(PACKED.read(body))


def _tasks(columns: Columns, numbers: Sequence[int]) -> dict[int, records.TaskRecord]:
    rows = {row[0]: row for row in columns.execute(_TASKS.format(of=_listed(numbers)))}
    return {number: _task(*rows[number]) for number in numbers if number in rows}


def _task(
    number: int,
    name: str,
    base_model: str,
    samples: bytes | None,
    texts: bytes | None,
    created_at: int,
    pinned: bool,
    tags: str | None,
    note: str | None,
) -> records.TaskRecord:
    files = DIGEST.read(samples), DIGEST.read(texts)
    return records.TaskRecord(
        number, name, base_model, *files, MOMENT.read(created_at), bool(pinned), WORDS.read(tags), note
    )


def _gain(documents: Mapping[int, bytes], gain: float | None, settings: int | None) -> tuple[float | None, str | None]:
    """Return a retained gain, and the precision of the base model in that."""
    return values.SHARE.read(gain), None if settings is None else PACKED.read(documents[settings]).get("dtype")


def _final(
    task: records.TaskRecord,
    documents: Mapping[int, bytes],
    extras: Mapping[int, Sequence[records.Extra]],
    number: int,
    folder: str,
    described: int,
    weights: bytes,
    weights_size: int,
    config: bytes,
    config_size: int,
    card: bytes | None,
    card_size: int | None,
    initial: bytes | None,
    initial_size: int | None,
    step: int | None,
    source: str | None,
    created_at: int,
    evicted_at: int | None,
    is_generated: bool,
    tensors_key: bytes | None,
    extra_count: int,
) -> records.AdapterRecord:
    common = _description(documents[described])
    return records.AdapterRecord(
        id=number,
        task=task.name,
        weights=DIGEST.read(weights),
        config=DIGEST.read(config),
        card=DIGEST.read(card),
        step=step,
        is_final=True,
        dtype=common.dtype,
        rank_max=common.rank_max,
        parameters=common.parameters,
        target_modules=common.target_modules,
        layout=common.layout,
        source=folder if source is None else source,
        is_generated=bool(is_generated),
        format=common.format,
        original_only=_why_original_only(common, task.base_model),
        does_nothing=common.does_nothing,
        template=common.template,
        extras=_extras_of(task.name, extras.get(number, ()), extra_count),
        initial=DIGEST.read(initial),
        tensors_key=DIGEST.read(tensors_key),
        original_bytes=weights_size + config_size + (card_size or 0),
        weights_bytes=weights_size,
        initial_bytes=initial_size or 0,
        created_at=MOMENT.read(created_at),
        evicted_at=MOMENT.read(evicted_at),
    )


def _code(
    task: str,
    number: int,
    adapter: int,
    generator_number: int,
    digest: bytes,
    size: int,
    bits: float,
    squared_error: float | None,
    residual: bytes | None,
    residual_size: int,
    residual_error: float | None,
    *more: Any,
) -> records.CodeRecord:
    *limits, claim, effect = more
    of_residual = values.SQUARED_ERROR.read(residual_error)
    squared = values.SQUARED_ERROR.read(squared_error)
    claimed = None if claim is None or squared is not None else records.Claim(**PACKED.read(claim))
    return records.CodeRecord(
        number,
        task,
        adapter,
        generator_number,
        DIGEST.read(digest),
        size,
        bits,
        squared,
        _limits(*limits),
        None
        if residual is None or of_residual is None
        else records.ResidualRecord(DIGEST.read(residual), of_residual, residual_size),
        claimed,
        values.SHARE.read(effect),
    )


def _figures(
    number: int,
    gain: float | None,
    precision: str | None,
    documents: Mapping[int, bytes],
    extras: Mapping[int, Sequence[records.Extra]],
    name: str,
    base_model: str,
    final: int | None,
    described: int,
    weights_size: int,
    original_size: int,
    is_evicted: bool,
    extra_count: int,
    code_size: int | None,
    residual_size: int | None,
    squared_error: float | None,
    residual_error: float | None,
    effect: float | None,
    has_claim: bool,
    *limits: Any,
) -> records.TaskFigures:
    if final is None:
        raise _lost(name)
    common = _description(documents[described])
    squared = values.SQUARED_ERROR.read(squared_error)
    of_residual = None if residual_size is None else values.SQUARED_ERROR.read(residual_error)
    return records.TaskFigures(
        number,
        name,
        base_model,
        common.parameters,
        original_size - (weights_size if is_evicted else 0),
        bool(is_evicted),
        _why_original_only(common, base_model),
        _extras_of(name, extras.get(final, ()), extra_count),
        code_size,
        None if of_residual is None else residual_size,
        squared if of_residual is None else of_residual,
        values.SHARE.read(effect),
        _limits(*limits),
        bool(has_claim) and squared is None,
        gain,
        precision,
    )


def _limits(
    min_gain: float | None,
    max_squared_error: float | None,
    tolerance: float | None,
    is_kept: bool | None,
    refined: int | None,
    max_size: int | None,
    keep: float | None,
) -> records.CodeLimits | None:
    if is_kept is None:
        return None
    max_error = records.relative_error(max_squared_error)
    return records.CodeLimits(min_gain, max_error, tolerance, bool(is_kept), refined or 0, max_size, keep)
