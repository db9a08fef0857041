"""`icm evict`: delete originals whose codes were checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from icm_cli.errors import ExitCode
from icm_cli.options import DeviceOpt, DryRunOpt, MinGainOpt, SomeTasksArg, WorkersOpt, option
from icm_cli.output import Field, Output
from icm_cli.session import Session, command, end
from icm_cli.text import as_fields, coded_size, figure
from icmlora.fleet.measure.metric_result import gain_text
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.evict.types import EvictReport, TaskEvicted

ErrorOpt = Annotated[
    float | None,
    option(
        "--max-error X", "Largest relative error that a code may have: ||dW' - dW|| / ||dW||, 0.3 for 30 %.", min=0.0
    ),
]
CheckpointsOpt = Annotated[bool, option("--checkpoints-only", "Delete only checkpoints; keep the final adapters.")]

PlaceholderOpt = Annotated[
    bool,
    option(
        "--placeholder",
        "Also replace the adapter in the folder it was ingested from by a small file; `icm restore` undoes that. "
        "Only files that have not changed are deleted there.",
    ),
]
KeepOpt = Annotated[
    bool,
    option(
        "--keep-originals",
        "With --placeholder: free only these folders. The store keeps the originals, so no limit is needed.",
    ),
]
_FIELDS: tuple[Field[TaskEvicted], ...] = (
    Field("task", lambda task: task.task, shrink=True),
    Field("result", lambda task: _result(task)),
    Field("freed", lambda task: human_size(task.freed) if task.adapters else "-", right=True),
    Field("code", lambda task: coded_size(task.code_size, task.residual_size), right=True),
    Field("relative error", lambda task: figure(task.relative_error), right=True),
    Field("retained gain", lambda task: gain_text(task.retained_gain, task.precision, 4), right=True),
)
_IN_FOLDER: Field[TaskEvicted] = Field(
    "freed in folder", lambda task: human_size(task.freed_in_folders) if task.freed_in_folders else "-", right=True
)
_STATUS = {
    "would_evict": "would evict",
    "known": "nothing to do",
    "original_only": "original only",
    "replaced": "placeholder",
    "would_replace": "would replace",
}


@command
def evict(
    session: Session,
    tasks: SomeTasksArg = None,
    max_error: ErrorOpt = None,
    min_gain: MinGainOpt = None,
    checkpoints_only: CheckpointsOpt = False,
    placeholder: PlaceholderOpt = False,
    keep_originals: KeepOpt = False,
    device: DeviceOpt = None,
    dry_run: DryRunOpt = False,
    workers: WorkersOpt = None,
) -> None:
    """Delete originals (final adapters and checkpoints), each after a check that its code can replace it.

    For the check, each code is read back from disk, with its residual if it has one, decoded, and measured against the
    original. A task whose code misses a limit keeps its original; so does a pinned task. Exit code 3 means that some
    originals were kept. Original-only tasks affect the exit code only when named. Works on a full disk, but
    for placeholders: each takes some bytes, and where they do not fit the folder stays and the exit code is 15.

    With --placeholder, the folder that an adapter was ingested from is freed too: `icm restore FOLDER` brings it back,
    from the original if the store kept it, else from the code.

    Example:
      icm evict --max-error 0.22 --dry-run
      icm evict --placeholder --keep-originals
    """
    from icmlora.fleet.evict.evict import evict

    report, stopped = session.run(
        "evict",
        lambda context: evict(
            context,
            tasks or [],
            max_error=max_error,
            min_gain=min_gain,
            checkpoints_only=checkpoints_only,
            placeholder=placeholder,
            keep_originals=keep_originals,
            dry_run=dry_run,
            device=session.device(device),
            workers=workers,
        ),
        lambda event: _tell(session, event),
    )
    _sum_up(session, report, dry_run=dry_run, placeholder=placeholder, keep_originals=keep_originals)
    code = ExitCode.NO_SPACE if report.is_full else ExitCode.PARTLY
    end(f"{counted(len(report.tasks), 'task')} checked", stopped=stopped, partly=report.partly, code=code)


def _tell(session: Session, event: Event) -> None:
    from icmlora.fleet.evict.types import TaskEvicted

    if isinstance(event, TaskEvicted):
        session.out.event("task", **as_fields(event))


def _sum_up(session: Session, report: EvictReport, *, dry_run: bool, placeholder: bool, keep_originals: bool) -> None:
    out = session.out
    out.event(
        "summary",
        dry_run=dry_run,
        tasks=len(report.tasks),
        evicted=len(report.gone),
        kept=len(report.kept),
        freed=report.freed,
        pending=report.pending,
        placeholders=len(report.placeholders),
        freed_in_folders=report.freed_in_folders,
    )
    freed = [task for task in report.tasks if task.freed_in_folders] if keep_originals else report.gone
    out.names(task.task for task in freed)
    shown = [*_FIELDS[:2], _IN_FOLDER] if keep_originals else [*_FIELDS, *([_IN_FOLDER] if placeholder else [])]
    out.listing(shown, sorted(report.tasks, key=lambda task: task.task))
    _tell_exceptions(out, report, dry_run=dry_run, keep_originals=keep_originals)
    if report.left:
        out.note(f"{human_size(report.left)} of this had been left by an interrupted `icm evict`")
    if not keep_originals:
        evicted, freeing = ("would evict", "would free") if dry_run else ("evicted", "freed")
        of_tasks = counted(len(report.tasks), "task")
        out.line(f"{evicted} {len(report.gone)} of {of_tasks}, {freeing} {human_size(report.freed)}")
        if report.pending:
            fact = f"{human_size(report.pending)} were written not long ago, and go with a later `icm prune`"
            out.note(f"{fact}: a place that is shared keeps what is young, an object store for 24 hours")
    if placeholder:
        _tell_folders(out, report, dry_run=dry_run, keep_originals=keep_originals)
    elif report.gone and not dry_run:
        out.hint("`icm materialize TASK -o DIR` decodes a code; `icm ingest --restore PATH` brings an original back")


def _tell_exceptions(out: Output, report: EvictReport, *, dry_run: bool, keep_originals: bool) -> None:
    """Name the tasks that keep something, and the folders that change."""
    for task in [] if keep_originals else report.kept:  # else their folders are listed
        out.line(f"kept {task.task}: {task.reason}")
    for task in report.gone:
        if task.reason is not None:
            out.line(f"{task.task}: {task.reason}")
    for task in report.original_only:
        out.line(f"original only, {task.task}: {task.reason}")
    for folder in report.placeholders:  # they are outside of the store, so each is named
        out.line(f"{'would leave' if dry_run else 'left'} a placeholder in {folder.path}")


def _tell_folders(out: Output, report: EvictReport, *, dry_run: bool, keep_originals: bool) -> None:
    left = [folder for folder in report.folders if folder.status == "left"]
    for folder in left:
        out.line(f"not replaced, {folder.path}: {folder.reason}")
    if report.is_full:
        out.hint("free some space, then run the same command again; `icm prune` also works on a full disk")
    if missing := sum(folder.status == "missing" for folder in report.folders):
        where = "is not in its folder" if missing == 1 else "are not in their folders"
        out.note(f"{counted(missing, 'adapter')} {where} any more, so there is nothing to replace")
    if not keep_originals and any(task.adapters > 1 for task in report.gone):
        out.note("checkpoints stay in their folders: they have no code, so nothing would bring them back")
    verb, freed = ("would leave", "would free") if dry_run else ("left", "freed")
    size = human_size(report.freed_in_folders)
    out.line(f"{verb} {counted(len(report.placeholders), 'placeholder')} in folders, {freed} {size} there")
    if report.placeholders and not dry_run:
        source = "byte for byte" if keep_originals else "from codes"
        out.hint(f"`icm restore FOLDER` brings adapters back, {source}")


def _result(task: TaskEvicted) -> str:
    # Its original was evicted before, and its folder has been freed now.
    replaced = task.status == "known" and any(folder.status == "replaced" for folder in task.folders)
    return "placeholder" if replaced else _STATUS.get(task.status, task.status)
