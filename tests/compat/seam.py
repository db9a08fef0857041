"""The only place that knows the names of icm's methods and fields: what changes there is changed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icmlora import Fleet
from icmlora.errors import AdapterRefused
from icmlora.fleet.tasks.details import TaskDetails
from registry.errors import IcmError, StoreNotFound
from registry.tables import TaskRow
from tests.compat.case import Case

_FEW_STEPS = 3


def ingest(fleet: Fleet, *folders: Path, **options: Any) -> Any:
    """Ingest folders as `icm ingest` does, and return the report; None if everything was refused."""
    try:
        return fleet.ingest(folders, **options)
    except AdapterRefused:
        return None


def tasks(fleet: Fleet) -> list[TaskRow]:
    """List the tasks; there is no store if everything was refused."""
    try:
        return fleet.tasks()
    except StoreNotFound:
        return []


def train(fleet: Fleet) -> dict[str, str]:
    """Train a generator for each base model; return what went wrong, by base model."""
    failed = {}
    for label in sorted({row.base for row in tasks(fleet)}):
        try:
            fleet.train(base_model=label, steps=_FEW_STEPS, device="cpu", refine=0, evaluate=False)
        except (IcmError, RuntimeError) as error:
            failed[label] = str(error)
    return failed


def outcome(fleet: Fleet, case: Case) -> str:
    """Return what became of a case, after training."""
    if case.name not in {row.name for row in tasks(fleet)}:
        return "refused"
    details = fleet.show(case.name)
    if why_original_only(details) is not None:
        return "original"
    if details.task.code is None:
        return "has no code"
    return "extras" if extras_bytes(details) > 0 else "exact"


def why_original_only(details: TaskDetails) -> str | None:
    """Return why a task cannot have a code."""
    return details.task.not_encodable


def extras_bytes(details: TaskDetails) -> int:
    """Return the bytes of what is kept beside a code: tensors and files."""
    return details.task.final.extras_bytes


def claimed_error(report: Any) -> float:
    """Return the relative error that `materialize` claims for the adapter it wrote."""
    return float(report.relative_error)
