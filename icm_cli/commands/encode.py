"""`icm encode`: re-encode tasks without training."""

from __future__ import annotations

from icm_cli.command import Call, command
from icm_cli.output import Field, Output
from icm_cli.report import end
from icm_cli.session import Session
from icm_cli.text import as_fields, coded_size, figure, grouped
from icmlora.fleet.context import Event
from icmlora.fleet.encode import encode as use_case
from icmlora.fleet.encode.report import EncodeReport, TaskEncoded
from icmlora.io.text import counted, human_size, some

_STATUS = {
    "known": "up to date",
    "below": "misses the limit",
    "evicted": "original evicted",
    "unmeasured": "not measured",
    "original_only": "original only",
    "changed": "changed during encoding",
}
_FIELDS: tuple[Field[TaskEncoded], ...] = (
    Field("task", lambda task: task.task, shrink=True),
    Field("result", lambda task: _STATUS.get(task.status, task.status)),
    Field("code", lambda task: coded_size(task.size), right=True),
    Field("before", lambda task: coded_size(task.before), right=True),
    Field("relative error", lambda task: figure(task.relative_error), right=True),
    Field("effect kept", lambda task: figure(task.effect, digits=3), right=True),
)


@command(use_case.encode)
def encode(session: Session, call: Call[EncodeReport]) -> None:
    report = call.run(lambda event: print_encoded(session, event))
    print_codes(session, report)
    if not report.stopped:
        print_evict_hint(session, report, call["max_error"])
    end(report, f"encoded {counted(len(report.done), 'task')}")


def print_encoded(session: Session, event: Event, kind: str = "task") -> None:
    """Print an encoded task as a JSON line of the given type."""
    if isinstance(event, TaskEncoded):
        session.out.event(kind, **as_fields(event, "new"))


def print_evict_hint(session: Session, report: EncodeReport, max_error: float | None) -> None:
    """Print the `icm evict` command with the same limit, or for a gain, if every task meets its limits."""
    if report.short or all(task.status == "evicted" for task in report.done):
        return
    limit = "--min-gain GAIN" if max_error is None else f"--max-error {max_error:g}"
    session.out.hint(f"run `icm evict {limit}` to delete the originals of tasks whose codes meet the limit")


def print_codes(session: Session, report: EncodeReport, *, brief: bool = False) -> None:
    """Print a table of tasks and a summary line, or with `brief` only the summary."""
    out = session.out
    now = sum(task.size or 0 for task in report.done)
    before = sum(task.before or 0 for task in report.done)
    if not brief:
        out.event("summary", tasks=len(report.done), short=len(report.short), size=now, before=before)
        out.listing(_FIELDS, sorted(report.done, key=lambda task: task.task))
    for reason, names in grouped((task.reason, task.task) for task in report.done if task.reason).items():
        out.line(f"{some(names)}: {reason}")
    done = sum(task.status == "encoded" for task in report.done) if brief else len(report.done)
    if done or not brief:
        summary = f"refined {counted(done, 'code')}" if brief else counted(done, "task")
        missed = "" if brief else f"; {len(report.short)} missed the limit"
        out.line(f"{summary}, {human_size(now)} in total, {human_size(before)} before{missed}")
    print_replaced(out, report.replaced_bytes)


def print_replaced(out: Output, size: int) -> None:
    """Print how many bytes are not needed after replacing codes."""
    if size:
        out.note(f"`icm prune` frees {human_size(size)} of replaced files")
