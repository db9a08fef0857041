"""Which of a task's stored measurements speaks for a rung."""

from __future__ import annotations

from collections.abc import Iterable

from registry.records import EvaluationRecord, GeneratorRecord, Rung, TaskRecord


def latest_of(
    evaluations: Iterable[EvaluationRecord], task: TaskRecord, rung: Rung, generator: GeneratorRecord
) -> EvaluationRecord | None:
    """Return the measurement of a generator's rung on the task's own held-out text, else the latest on any text."""
    rows = [row for row in evaluations if row.rung == rung and row.generator_id == generator.id]
    return max(rows, key=lambda row: (row.data == task.eval_data, row.id), default=None)
