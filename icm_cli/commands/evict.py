"""`icm evict`: delete originals after checking their codes."""

from __future__ import annotations

from icm_cli.command import Call, command
from icm_cli.errors import ExitCode
from icm_cli.output import Field, Output
from icm_cli.report import end
from icm_cli.session import Session
from icm_cli.text import coded_size, figure
from icmlora.fleet.evict import evict as eviction
from icmlora.fleet.evict.types import EvictReport, TaskEvicted
from icmlora.fleet.measure.metric_result import gain_text
from icmlora.io.text import counted, human_size

_FIELDS: tuple[Field[TaskEvicted], ...] = (
    Field("task", lambda task: task.task, shrink=True),
    Field("result", lambda task: _result(task)),
    Field("freed", lambda task: human_size(task.freed) if task.adapters else "-", right=True),
    Field("code", lambda task: coded_size(task.code_size), right=True),
    Field("relative error", lambda task: figure(task.relative_error), right=True),
    Field("retained gain", lambda task: gain_text(task.retained_gain, task.precision, 4), right=True),
)
_IN_FOLDER: Field[TaskEvicted] = Field(
    "freed in folder", lambda task: human_size(task.freed_in_folders) if task.freed_in_folders else "-", right=True
)
_STATUS = {
    "would_evict": "would evict",
    "known": "unchanged",
    "original_only": "original only",
    "replaced": "placeholder",
    "would_replace": "would replace",
}


def _result(task: TaskEvicted) -> str:
    # The original was evicted earlier; this run freed the folder.
    replaced = task.status == "known" and any(folder.status == "replaced" for folder in task.folders)
    return "placeholder" if replaced else _STATUS.get(task.status, task.status)


@command(eviction.evict)
def evict(session: Session, call: Call[EvictReport]) -> None:
    report, out = call.run(), session.out
    dry_run, placeholder, keep_originals = call["dry_run"], call["placeholder"], call["keep_originals"]
    out.event(
        "summary",
        dry_run=dry_run,
        tasks=len(report.done),
        evicted=len(report.gone),
        kept=len(report.kept),
        freed=report.freed,
        pending=report.pending,
        placeholders=len(report.placeholders),
        freed_in_folders=report.freed_in_folders,
    )
    freed = [task for task in report.done if task.freed_in_folders] if keep_originals else report.gone
    out.names(task.task for task in freed)
    shown = [*_FIELDS[:2], _IN_FOLDER] if keep_originals else [*_FIELDS, *([_IN_FOLDER] if placeholder else [])]
    out.listing(shown, sorted(report.done, key=lambda task: task.task))
    for task in [] if keep_originals else report.kept:  # with keep_originals, folders are listed instead
        out.line(f"kept {task.task}: {task.reason}")
    for task in report.gone:
        if task.reason is not None:
            out.line(f"{task.task}: {task.reason}")
    for task in report.done:
        if task.status == "original_only":
            out.line(f"kept {task.task}, original only: {task.reason}")
    for folder in report.placeholders:  # outside the store, so name each
        out.line(f"{'would write' if dry_run else 'wrote'} a placeholder to {folder.path}")
    if left := sum(task.left for task in report.done):
        out.note(f"{human_size(left)} of this remained from an earlier `icm evict`")
    if not keep_originals:
        evicted, freeing = ("would evict", "would free") if dry_run else ("evicted", "freed")
        of_tasks = counted(len(report.done), "task")
        out.line(f"{evicted} {len(report.gone)} of {of_tasks}, {freeing} {human_size(report.freed)}")
        if report.is_in_use:
            out.note(f"the next `icm prune` frees {human_size(report.pending)}: another process uses the store")
        elif report.pending:
            fact = f"{human_size(report.pending)} will be freed by a later `icm prune`"
            out.note(f"{fact}; shared storage keeps recent files, object stores for 24 hours")
    if placeholder:
        _print_folders(out, report, dry_run=dry_run, keep_originals=keep_originals)
    elif report.gone and not dry_run:
        out.hint(
            "run `icm materialize TASK -o DIR` to decode a code, `icm ingest --restore PATH` to restore an original"
        )
    code = ExitCode.NO_SPACE if report.is_full else ExitCode.PARTLY
    end(report, f"checked {counted(len(report.done), 'task')}", code=code)


def _print_folders(out: Output, report: EvictReport, *, dry_run: bool, keep_originals: bool) -> None:
    for folder in report.folders:
        if folder.status == "left":
            out.line(f"kept {folder.path}: {folder.reason}")
    if report.is_full:
        out.hint("free some space, then run the same command again; `icm prune` also works on a full disk")
    if missing := sum(folder.status == "missing" for folder in report.folders):
        where = "its source folder" if missing == 1 else "their source folders"
        out.note(f"skipped {counted(missing, 'adapter')} no longer in {where}")
    if not keep_originals and any(task.adapters > 1 for task in report.gone):
        out.note("kept checkpoints in their folders: they have no code, so they could not be restored")
    verb, freed = ("would write", "would free") if dry_run else ("wrote", "freed")
    size = human_size(report.freed_in_folders)
    out.line(f"{verb} {counted(len(report.placeholders), 'placeholder')}, {freed} {size} in source folders")
    if report.placeholders and not dry_run:
        source = "byte for byte" if keep_originals else "from codes"
        out.hint(f"run `icm restore FOLDER` to restore adapters {source}")
