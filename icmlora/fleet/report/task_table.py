"""The table of a report: a row for each task, as numbers and short texts that the page's script shows.

Texts that many rows share are in lists, and a row has their places there: the script then sorts every column by
numbers, and the page of a large fleet stays small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from icmlora.fleet.measure.metric_result import measured_in
from icmlora.fleet.stats.bill_text import limits_text
from icmlora.fleet.stats.stats import Bill, TaskBill
from icmlora.io.text import escape, escape_lines
from icmlora.task_vectors.map import MappedTask
from registry.names import natural_key
from registry.records import TaskSummary

KEPT = (
    "code",
    "original + code",
    "original",
    "original only",
    "nothing",
)
"""What the store has of a task. `original only` can have no code; `original` may have one after `icm train`."""
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


def task_table(rows: Sequence[TaskSummary], bill: Bill, mapped: Mapping[str, MappedTask]) -> TaskTable:
    """Return the table of all tasks; `mapped` has those that are on a map."""
    bills = {task.task: task for fleet in bill.fleets for task in fleet.tasks}
    rows = sorted(rows, key=lambda row: (natural_key(row.task.name.lower()), row.task.name))
    lists = {
        "base": _sorted(row.task.base_model for row in rows),
        "kept": list(KEPT),
        "tags": _sorted(tag for row in rows for tag in row.task.tags),
        "dtype": _sorted(row.final.dtype.lower() for row in rows),
        "targets": _sorted(_targets(row) for row in rows),
        "why": _sorted(row.final.original_only for row in rows if row.final.original_only is not None),
    }
    places = {column: {text: place for place, text in enumerate(texts)} for column, texts in lists.items()}
    shown = {column: [escape(text) for text in texts] for column, texts in lists.items()}
    return TaskTable(
        [_row(row, bills[row.task.name], mapped.get(row.task.name), places) for row in rows],
        shown,
        {row.task.name: number for number, row in enumerate(rows)},
    )


def _row(
    row: TaskSummary, bill: TaskBill, mapped: MappedTask | None, places: Mapping[str, Mapping[str, int]]
) -> Sequence[object]:
    task, final = row.task, row.final
    size = None if bill.code_size is None or bill.original_only is not None else bill.size
    fields = {
        "name": escape(task.name),
        "base": places["base"][task.base_model],
        "kept": KEPT.index(_kept(bill)),
        "rank": final.rank_max,
        "original": final.original_bytes,
        "size": size,
        "share": _rounded(size / bill.bf16_size if size is not None and bill.bf16_size else None),
        "error": _rounded(bill.relative_error),
        "gain": _rounded(bill.retained_gain),
        "precision": measured_in([bill.precision]) or None,  # shown after the gain
        "tags": [places["tags"][tag] for tag in task.tags],
        "parameters": final.parameters,
        "dtype": places["dtype"][final.dtype.lower()],
        "targets": places["targets"][_targets(row)],
        "code": bill.code_size,
        "vectors": bill.vectors_size,
        "extras": bill.extras_bytes,
        "created": task.created_at[:10],
        "marks": [mark for mark, holds in (("pinned", task.pinned), ("generated", final.is_generated)) if holds],
        "note": None if task.note is None else escape_lines(task.note),
        "why": None if final.original_only is None else places["why"][final.original_only],
        "limits": None if not bill.fell_short or bill.asked is None else limits_text(bill.asked),
        "cluster": None if mapped is None else mapped.cluster,
        "nearest": None if mapped is None else [escape(mapped.nearest.task), _rounded(mapped.nearest.distance)],
    }
    return [fields[column] for column in COLUMNS]


def _kept(bill: TaskBill) -> str:
    if bill.original_only is not None:
        return "original only"
    if bill.evicted:
        return "nothing" if bill.code_size is None else "code"
    return "original" if bill.code_size is None else "original + code"


def _targets(row: TaskSummary) -> str:
    return ", ".join(row.final.target_modules)


def _rounded(value: float | None) -> float | None:
    """Round to the displayed precision, so that the page sorts by displayed values."""
    return None if value is None else float(f"{value:.3f}")


def _sorted(texts: Iterable[str]) -> list[str]:
    return sorted(set(texts), key=lambda text: (natural_key(text.lower()), text))
