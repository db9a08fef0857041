"""`icm edit`: change the name, the tags and the note of tasks, and pin their originals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from icm_cli.errors import UsageProblem
from icm_cli.options import TasksArg, option
from icm_cli.output import Field
from icm_cli.session import Session, command

if TYPE_CHECKING:
    from icmlora.fleet.records import TaskRecord
    from icmlora.fleet.tasks.tasks import EditReport

NewNameOpt = Annotated[str | None, option("--name NEW", "Another name, for one task.")]
TagOpt = Annotated[list[str] | None, option("--tag TAG", "A tag to add. Repeat it for several.", completes="tag")]
UntagOpt = Annotated[
    list[str] | None, option("--untag TAG", "A tag to remove. Repeat it for several.", completes="tag")
]
NoteOpt = Annotated[str | None, option("--note TEXT", "A note, in place of an earlier one.")]
NoNoteOpt = Annotated[bool, option("--no-note", "Remove the note.")]
PinOpt = Annotated[bool | None, option("--pin/--no-pin", "Whether `icm evict` keeps their originals.")]

_FIELDS: tuple[Field[TaskRecord], ...] = (
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
    """Rename a task, tag tasks, keep a note with them, or pin their originals. Without an option, show what is set.

    Adapters, vectors, codes and measurements stay with a task. A name has letters and digits of any script, ".", "_"
    and "-"; bundles and folders from before keep the old one. `icm evict` never deletes a pinned original. `icm ls
    --tags` lists all tags. All changes are made, or none.

    Example:
      icm edit lora-final-v2 --name poems
      icm edit poems rules --tag prod --untag trial --pin
      icm edit poems --note "for the spring demo; rank 8 was enough"
    """
    from icmlora.fleet.tasks.tasks import edit_tasks

    if note is not None and no_note:
        raise UsageProblem("a note is either given or removed", hint="leave out --note or --no-note")
    done = edit_tasks(
        session.context,
        tasks,
        name=name,
        add_tags=tag or (),
        remove_tags=untag or (),
        note=False if no_note else note,
        pinned=pin,
    )
    _tell(session, done, is_pinned=pin is True)


def _tell(session: Session, done: EditReport, *, is_pinned: bool) -> None:
    out = session.out
    out.document(
        [{"task": task.name, "tags": list(task.tags), "note": task.note, "pinned": task.pinned} for task in done.tasks]
    )
    out.names(task.name for task in done.tasks)
    out.listing(_FIELDS, done.tasks)
    if is_pinned and done.evicted:
        out.note(f"already evicted, so there is no original to keep: {', '.join(done.evicted)}")
