"""`icm evict`: delete originals after checking their codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from icm_cli.command import plain_command as command
from icm_cli.errors import ExitCode
from icm_cli.options import DeviceOpt, DryRunOpt, SomeTasksArg, WorkersOpt, option
from icm_cli.output import Field, Output
from icm_cli.session import Session, end
from icm_cli.text import as_fields, coded_size, figure
from icmlora.fleet.measure.metric_result import gain_text
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.evict.types import EvictReport, TaskEvicted

ErrorOpt = Annotated[
    float | None,
    option("--max-error X", "Maximum relative error of a code, ||dW' - dW|| / ||dW||. 0.3 means 30 %.", min=0.0),
]
MinGainOpt = Annotated[
    float | None,
    option(
        "--min-gain G",
        "Minimum retained gain of a code on the task's held-out text. Needs the base model.",
        min=0.0,
        max=1.0,
    ),
]
CheckpointsOpt = Annotated[bool, option("--checkpoints-only", "Delete only checkpoints. Keep the final adapters.")]

PlaceholderOpt = Annotated[
    bool,
    option(
        "--placeholder",
        "Also replace the adapter in its source folder with a small file. `icm restore` undoes this. "
        "Modified files are not deleted.",
    ),
]
KeepOpt = Annotated[
    bool,
    option(
        "--keep-originals",
        "With --placeholder: free only the source folders. The store keeps the originals, so no limit is needed.",
    ),
]
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
    """Delete originals after checking that their codes can replace them.

    An original is the final adapter and its checkpoints. Each code is read from disk, decoded, and
    compared with the original. Pinned tasks and tasks whose code misses a limit keep their original, and the exit code
    is 3. Original-only tasks affect the exit code only when named. TASK@2 is an earlier version of a task.

    With --placeholder, the source folder of the adapter is freed too. `icm restore FOLDER` restores it from the
    original if the store kept it, else from the code. Eviction works on a full disk, but a placeholder needs a few
    bytes. Without space for it, the folder is kept and the exit code is 15.


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
        lambda event: _print_event(session, event),
    )
    _sum_up(session, report, dry_run=dry_run, placeholder=placeholder, keep_originals=keep_originals)
    code = ExitCode.NO_SPACE if report.is_full else ExitCode.PARTLY
    end(f"checked {counted(len(report.tasks), 'task')}", stopped=stopped, partly=report.partly, code=code)


def _print_event(session: Session, event: Event) -> None:
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
    _print_exceptions(out, report, dry_run=dry_run, keep_originals=keep_originals)
    if report.left:
        out.note(f"{human_size(report.left)} of this remained from an earlier `icm evict`")
    if not keep_originals:
        evicted, freeing = ("would evict", "would free") if dry_run else ("evicted", "freed")
        of_tasks = counted(len(report.tasks), "task")
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


def _print_exceptions(out: Output, report: EvictReport, *, dry_run: bool, keep_originals: bool) -> None:
    """Print the tasks that keep data and the changed folders."""
    for task in [] if keep_originals else report.kept:  # with keep_originals, folders are listed instead
        out.line(f"kept {task.task}: {task.reason}")
    for task in report.gone:
        if task.reason is not None:
            out.line(f"{task.task}: {task.reason}")
    for task in report.original_only:
        out.line(f"kept {task.task}, original only: {task.reason}")
    for folder in report.placeholders:  # outside the store, so name each
        out.line(f"{'would write' if dry_run else 'wrote'} a placeholder to {folder.path}")


def _print_folders(out: Output, report: EvictReport, *, dry_run: bool, keep_originals: bool) -> None:
    left = [folder for folder in report.folders if folder.status == "left"]
    for folder in left:
        out.line(f"kept {folder.path}: {folder.reason}")
    if report.is_full:
        out.hint("free some space, then run the same command again; `icm prune` also works on a full disk")
    if missing := sum(folder.status == "missing" for folder in report.folders):
        out.note(
            f"skipped {counted(missing, 'adapter')} no longer in {'its' if missing == 1 else 'their'} source folder"
        )
    if not keep_originals and any(task.adapters > 1 for task in report.gone):
        out.note("kept checkpoints in their folders: they have no code, so they could not be restored")
    verb, freed = ("would write", "would free") if dry_run else ("wrote", "freed")
    size = human_size(report.freed_in_folders)
    out.line(f"{verb} {counted(len(report.placeholders), 'placeholder')}, {freed} {size} in source folders")
    if report.placeholders and not dry_run:
        source = "byte for byte" if keep_originals else "from codes"
        out.hint(f"run `icm restore FOLDER` to restore adapters {source}")


def _result(task: TaskEvicted) -> str:
    # The original was evicted earlier; this run freed the folder.
    replaced = task.status == "known" and any(folder.status == "replaced" for folder in task.folders)
    return "placeholder" if replaced else _STATUS.get(task.status, task.status)
