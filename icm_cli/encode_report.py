"""Print what became of codes that were encoded again: by `icm encode`, or at the end of `icm train`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icm_cli.output import Column
from icm_cli.session import Session
from icm_cli.text import as_fields, coded_size
from icmlora.fleet.measure.precision import gain_text
from icmlora.io.text import counted, human_size, some

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.encode.encode import EncodeReport, TaskEncoded

_COLUMNS = (
    Column("task", shrink=True),
    Column("result"),
    Column("code", right=True),
    Column("before", right=True),
    Column("relative error", right=True),
    Column("retained gain", right=True),
)
_STATUS = {
    "known": "up to date",
    "enough": "code is enough",
    "below": "misses the limit",
    "evicted": "original evicted",
    "unmeasured": "not measured",
    "original_only": "original only",
    "changed": "changed meanwhile",
}


def tell_encoded(session: Session, event: Event, kind: str = "task") -> None:
    """Report one task that is done, as a JSON line of a kind."""
    from icmlora.fleet.encode.encode import TaskEncoded

    if isinstance(event, TaskEncoded):
        session.out.event(kind, **as_fields(event))


def tell_next(session: Session, report: EncodeReport, max_error: float | None, min_gain: float | None) -> None:
    """Say which command deletes originals under the same limits, if every task meets them."""
    if report.short or all(task.status == "evicted" for task in report.tasks):
        return
    limits = (("--max-error", max_error), ("--min-gain", min_gain))
    same = " ".join(f"{option} {limit:g}" for option, limit in limits if limit is not None)
    session.out.hint(
        f"`icm evict {same or '--min-gain GAIN'}` deletes the originals of tasks whose codes meet the limit"
    )


def sum_up(session: Session, report: EncodeReport, *, brief: bool = False) -> None:
    """Print what was done with each task, or in all."""
    out = session.out
    now = sum((task.size or 0) + (task.residual_size or 0) for task in report.tasks)
    before = sum(task.before or 0 for task in report.tasks)
    if not brief:
        out.event("summary", tasks=len(report.tasks), short=len(report.short), size=now, before=before)
        out.table(_COLUMNS, [_cells(task) for task in sorted(report.tasks, key=lambda task: task.task)])
    for reason, names in _reasons(report).items():
        out.line(f"{some(names)}: {reason}")
    done = sum(task.status == "encoded" for task in report.tasks) if brief else len(report.tasks)
    if done or not brief:
        what = f"refined {counted(done, 'code')}" if brief else counted(done, "task")
        missed = "" if brief else f"; {len(report.short)} without a code that meets the limit"
        out.line(f"{what}, {human_size(now)} in total, {human_size(before)} before{missed}")


def _reasons(report: EncodeReport) -> dict[str, list[str]]:
    """Return the tasks of each reason."""
    found: dict[str, list[str]] = {}
    for task in report.tasks:
        if task.reason:
            found.setdefault(task.reason, []).append(task.task)
    return found


def _cells(task: TaskEncoded) -> list[str]:
    return [
        task.task,
        _STATUS.get(task.status, task.status),
        coded_size(task.size, task.residual_size),
        "-" if task.before is None else human_size(task.before),
        "-" if task.relative_error is None else f"{task.relative_error:.4f}",
        gain_text(task.retained_gain, task.precision, digits=4),
    ]
