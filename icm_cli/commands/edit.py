"""`icm edit`: change the name, tags, note or pin of tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from icm_cli.command import plain_command as command
from icm_cli.errors import UsageProblem
from icm_cli.options import TasksArg, option
from icm_cli.output import Field
from icm_cli.session import Session

if TYPE_CHECKING:
    from icmlora.fleet.tasks.tasks import EditReport
    from registry.manifests import Task

NewNameOpt = Annotated[str | None, option("--name NEW", "New name. For a single task.")]
TagOpt = Annotated[list[str] | None, option("--tag TAG", "Tag to add. Can be repeated.", completes="tag")]
UntagOpt = Annotated[list[str] | None, option("--untag TAG", "Tag to remove. Can be repeated.", completes="tag")]
NoteOpt = Annotated[str | None, option("--note TEXT", "New note. Replaces the old one.")]
NoNoteOpt = Annotated[bool, option("--no-note", "Remove the note.")]
PinOpt = Annotated[bool | None, option("--pin/--no-pin", "Protect the originals from `icm evict`.")]

_FIELDS: tuple[Field[Task], ...] = (
    Field("task", lambda task: task.name, shrink=True),
    Field("tags", lambda task: ", ".join(task.tags) or "-", shrink=True),
    Field("pinned", lambda task: "yes" if task.pinned else "-"),
    Field("note", lambda task: task.note or "-", shrink=True),
)


@command
def edit(
    session: Session,
    tasks: TasksArg,
    name: NewNameOpt = None,
    tag: TagOpt = None,
    untag: UntagOpt = None,
    note: NoteOpt = None,
    no_note: NoNoteOpt = False,
    pin: PinOpt = None,
) -> None:
    """Change the name, tags, note or pin of tasks.

    Without options, the current values are printed. A name may contain letters and digits of any script, ".", "_" and
    "-". Existing bundles and folders keep the old name. `icm evict` never deletes a pinned original. Either all changes
    are made or none.

    Example:
      icm edit lora-final-v2 --name poems
      icm edit poems rules --tag prod --untag trial --pin
    """
    from icmlora.fleet.tasks.tasks import edit_tasks

    if note is not None and no_note:
        raise UsageProblem("--note and --no-note cannot be used together", hint="omit one of them")
    done = edit_tasks(
        session.context,
        tasks,
        name=name,
        add_tags=tag or (),
        remove_tags=untag or (),
        note=False if no_note else note,
        pinned=pin,
    )
    _print_report(session, done, is_pinned=pin is True)


def _print_report(session: Session, done: EditReport, *, is_pinned: bool) -> None:
    out = session.out
    out.document(
        [{"task": task.name, "tags": list(task.tags), "note": task.note, "pinned": task.pinned} for task in done.tasks]
    )
    out.names(task.name for task in done.tasks)
    out.listing(_FIELDS, done.tasks)
    if is_pinned and done.evicted:
        out.note(f"already evicted, no original to pin: {', '.join(done.evicted)}")
