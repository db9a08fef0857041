"""`icm edit`: change the name, tags, note or pin of tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from icm_cli.command import Call, command
from icm_cli.errors import UsageProblem
from icm_cli.output import Field
from icm_cli.session import Session
from icmlora.fleet.params import Param
from icmlora.fleet.tasks.editing import EditReport, edit_tasks

if TYPE_CHECKING:
    from registry.manifests import Task

_FIELDS: tuple[Field[Task], ...] = (
    Field("task", lambda task: task.name, shrink=True),
    Field("tags", lambda task: ", ".join(task.tags) or "-", shrink=True),
    Field("pinned", lambda task: "yes" if task.pinned else "-"),
    Field("note", lambda task: task.note or "-", shrink=True),
)


@command(edit_tasks, without=("note",))
def edit(
    session: Session,
    call: Call[EditReport],
    note: Annotated[str | None, Param("New note. Replaces the old one.", "--note TEXT")] = None,
    no_note: Annotated[bool, Param("Remove the note.", "--no-note")] = False,
) -> None:
    if note is not None and no_note:
        raise UsageProblem("--note and --no-note cannot be used together", hint="omit one of them")
    done, out = call.now(note=False if no_note else note), session.out
    names = ("tags", "note", "pinned")
    out.document([{"task": task.name, **{name: getattr(task, name) for name in names}} for task in done.tasks])
    out.names(task.name for task in done.tasks)
    out.listing(_FIELDS, done.tasks)
    if call["pinned"] and done.evicted:
        out.note(f"already evicted, no original to pin: {', '.join(done.evicted)}")
