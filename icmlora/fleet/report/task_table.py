"""The table of a report: a row for each task, as numbers and short texts that the page's script shows.

Texts that many rows share are in lists, and a row has their places there: the script then sorts every column by
numbers, and the page of a large fleet stays small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icmlora.fleet.measure.metric_result import measured_in
from icmlora.fleet.stats.bill import Bill, TaskBill
from icmlora.fleet.stats.bill_text import limits_text
from icmlora.io.text import escape, escape_lines
from icmlora.task_vectors.map import MappedTask
from registry.names import natural_key

if TYPE_CHECKING:
    from registry.tables import TaskRow

KEPT = (
    "code",
    "original + code",
    "original",
    "original only",
    "nothing",
)
"""What the store has of a task. `original only` cannot have a code; `original` may have one after `icm train`."""
COLUMNS = (
    *("name", "base", "kept", "rank", "original", "size", "share", "error", "gain", "precision", "tags"),
    *("parameters", "dtype", "targets", "code", "vectors", "extras", "created"),
    *("marks", "note", "why", "limits", "cluster", "nearest"),
)
"""Columns of a row, in order; sizes in bytes."""


@dataclass(frozen=True)
class TaskTable:
    """The rows of all tasks, by name, and the lists that they refer to."""

    rows: Sequence[Sequence[object]]
    lists: Mapping[str, Sequence[str]]  # column -> the texts that its numbers refer to, sorted
    numbers: Mapping[str, int]  # task -> its row


def task_table(bill: Bill, mapped: Mapping[str, MappedTask]) -> TaskTable:
    """Return the table of all tasks; `mapped` has those that are on a map."""
    tasks = sorted(bill.each, key=lambda task: (natural_key(task.row.name.lower()), task.row.name))
    rows = [task.row for task in tasks]
    lists = {
        "base": _sorted(row.base for row in rows),
        "kept": list(KEPT),
        "tags": _sorted(tag for row in rows for tag in row.tags.split()),
        "dtype": _sorted(row.dtype.lower() for row in rows),
        "targets": _sorted(_targets(row.targets) for row in rows),
        "why": _sorted(row.original_only for row in rows if row.original_only is not None),
    }
    places = {column: {text: place for place, text in enumerate(texts)} for column, texts in lists.items()}
    shown = {column: [escape(text) for text in texts] for column, texts in lists.items()}
    return TaskTable(
        [_row(task, mapped.get(task.row.name), places) for task in tasks],
        shown,
        {row.name: number for number, row in enumerate(rows)},
    )


def _row(task: TaskBill, mapped: MappedTask | None, places: Mapping[str, Mapping[str, int]]) -> Sequence[object]:
    row = task.row
    size = task.size if row.is_coded and row.original_only is None else None
    fields = {
        "name": escape(row.name),
        "base": places["base"][row.base],
        "kept": KEPT.index(_kept(row)),
        "rank": row.rank,
        "original": row.original_bytes,
        "size": size,
        "share": _rounded(size / task.bf16_size if size is not None and task.bf16_size else None),
        "error": _rounded(task.relative_error),
        "gain": _rounded(row.gain),
        "precision": measured_in([row.gain_precision]) or None,  # shown after the gain
        "tags": [places["tags"][tag] for tag in row.tags.split()],
        "parameters": row.parameters,
        "dtype": places["dtype"][row.dtype.lower()],
        "targets": places["targets"][_targets(row.targets)],
        "code": row.code_size,
        "vectors": row.vectors_bytes,
        "extras": row.extras_bytes,
        "created": row.created_at[:10],
        "marks": [mark for mark, holds in (("pinned", row.pinned), ("generated", row.is_generated)) if holds],
        "note": None if row.note is None else escape_lines(row.note),
        "why": None if row.original_only is None else places["why"][row.original_only],
        "limits": limits_text(task.limits) if task.limits is not None and task.misses_limit else None,
        "cluster": None if mapped is None else mapped.cluster,
        "nearest": None if mapped is None else [escape(mapped.nearest.task), _rounded(mapped.nearest.distance)],
    }
    return [fields[column] for column in COLUMNS]


def _kept(row: TaskRow) -> str:
    if row.original_only is not None:
        return "original only"
    if row.evicted_at is not None:
        return "code" if row.is_coded else "nothing"
    return "original + code" if row.is_coded else "original"


def _targets(names: str) -> str:
    return ", ".join(names.split())


def _rounded(value: float | None) -> float | None:
    """Round to the displayed precision, so that the page sorts by displayed values."""
    return None if value is None else float(f"{value:.3f}")


def _sorted(texts: Iterable[str]) -> list[str]:
    return sorted(set(texts), key=lambda text: (natural_key(text.lower()), text))
