"""`icm tag`: add tags to tasks, remove them, list them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import UsageProblem
from icm_cli.options import completing
from icm_cli.output import Column
from icm_cli.session import Session, command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from icmlora.fleet.records import TaskRecord

TasksArg = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TASK]...",
        help="Names of tasks (see `icm ls`).",
        autocompletion=completing("task"),
        show_default=False,
    ),
]
AddOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--add",
        "-a",
        metavar="TAG",
        help="A tag to add. Repeat it for several.",
        autocompletion=completing("tag"),
        show_default=False,
    ),
]
RemoveOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--remove",
        "-r",
        metavar="TAG",
        help="A tag to remove. Repeat it for several.",
        autocompletion=completing("tag"),
        show_default=False,
    ),
]

_COLUMNS = (Column("tag"), Column("tasks", right=True))


@command
def tag(session: Session, tasks: TasksArg = None, add: AddOpt = None, remove: RemoveOpt = None) -> None:
    """Add tags to tasks and remove others, or print the tags of tasks.

    Without TASK, list every tag with the number of its tasks. `icm ls -f tag=prod` lists the tasks of a tag.

    Example:
      icm tag poems rules --add prod --remove trial
    """
    from icmlora.fleet.tasks.tasks import list_tags, tag_tasks

    out, context = session.out, session.context
    if not tasks:
        if add or remove:
            raise UsageProblem("no task is named", hint="icm tag TASK... --add TAG; `icm ls` lists the tasks")
        tags = list_tags(context)
        out.document([{"tag": tag, "tasks_count": number} for tag, number in tags.items()])
        _list(session, tags)
        return
    done = tag_tasks(context, tasks, add=add or (), remove=remove or ())
    out.document([{"task": task.name, "tags": list(task.tags)} for task in done])
    for task in done:
        out.answer(_line(task))


def _list(session: Session, tags: Mapping[str, int]) -> None:
    if session.out.is_quiet:
        for tag in tags:
            session.out.answer(tag)
    session.out.table(_COLUMNS, [[tag, str(number)] for tag, number in tags.items()])
    if not tags:
        session.out.note("no task has a tag")


def _line(task: TaskRecord) -> str:
    return f"{task.name}: {', '.join(task.tags) or 'no tags'}"
