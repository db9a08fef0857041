"""Old spellings of commands, hidden, for one version. Each does what it did, and says which command does it now."""

from __future__ import annotations

from typing import Annotated

import typer

from icm_cli.commands.convert import show_formats
from icm_cli.commands.doctor import What, path_of
from icm_cli.commands.ls import list_tags
from icm_cli.engine_config import Engine, print_config
from icm_cli.errors import UsageProblem
from icm_cli.options import FromOpt, GatewayOpt, ServedBaseOpt, TaskArg, TasksArg, argument, option
from icm_cli.session import Session, command
from icmlora.io.text import counted


def _tell_new(session: Session, new: str) -> None:
    session.out.note(f"`{session.command}` goes with the next version: use `icm {new}`")


@command
def mv(session: Session, task: TaskArg, new: Annotated[str, argument("NEW")]) -> None:
    """Rename a task, as `icm edit --name` does."""
    from icmlora.fleet.tasks.tasks import edit_tasks

    (done,) = edit_tasks(session.context, [task], name=new).tasks
    session.out.document({"old": task, "new": done.name})
    session.out.line(f"{task} is now {done.name}")
    _tell_new(session, "edit TASK --name NEW")


@command
def tag(
    session: Session,
    tasks: Annotated[list[str] | None, argument("[TASK]...", completes="task")] = None,
    add: Annotated[list[str] | None, option("--add -a TAG", completes="tag")] = None,
    remove: Annotated[list[str] | None, option("--remove -r TAG", completes="tag")] = None,
) -> None:
    """Add tags and remove others, as `icm edit --tag` and `--untag` do; without TASK, list tags as `icm ls --tags`."""
    from icmlora.fleet.tasks.tasks import edit_tasks

    if not tasks:
        if add or remove:
            raise UsageProblem("no task is named", hint="icm edit TASK... --tag TAG; `icm ls` lists the tasks")
        list_tags(session)
        _tell_new(session, "ls --tags")
        return
    done = edit_tasks(session.context, tasks, add_tags=add or (), remove_tags=remove or ()).tasks
    session.out.document([{"task": task.name, "tags": list(task.tags)} for task in done])
    for task in done:
        session.out.answer(f"{task.name}: {', '.join(task.tags) or 'no tags'}")
    _tell_new(session, "edit TASK --tag TAG --untag TAG")


@command
def note(
    session: Session,
    task: TaskArg,
    text: Annotated[str | None, argument("[TEXT]")] = None,
    clear: Annotated[bool, option("--clear", "Remove the note.")] = False,
) -> None:
    """Keep a note with a task, as `icm edit --note` does; without TEXT, print it."""
    from icmlora.fleet.tasks.tasks import edit_tasks

    if text is not None and clear:
        raise UsageProblem("a note is either given or cleared", hint="leave out TEXT or --clear")
    (done,) = edit_tasks(session.context, [task], note=False if clear else text).tasks
    session.out.document({"task": done.name, "note": done.note})
    if done.note is None:
        session.out.note(f"{done.name} has no note")
    elif text is None:
        session.out.answer(done.note)
    else:
        session.out.note(f"{done.name} has this note now")
    _tell_new(session, "edit TASK --note TEXT" if clear or text is not None else "show TASK")


@command
def pin(session: Session, tasks: TasksArg) -> None:
    """Keep the originals of tasks, as `icm edit --pin` does."""
    from icmlora.fleet.tasks.tasks import edit_tasks

    done = edit_tasks(session.context, tasks, pinned=True)
    session.out.document({"pinned": [task.name for task in done.tasks]})
    session.out.line(f"pinned {counted(len(done.tasks), 'task')}")
    if done.evicted:
        session.out.note(f"already evicted, so there is no original to keep: {', '.join(done.evicted)}")
    _tell_new(session, "edit TASK --pin")


@command
def unpin(session: Session, tasks: TasksArg) -> None:
    """Allow `icm evict` to delete originals again, as `icm edit --no-pin` does."""
    from icmlora.fleet.tasks.tasks import edit_tasks

    done = edit_tasks(session.context, tasks, pinned=False)
    session.out.document({"unpinned": [task.name for task in done.tasks]})
    session.out.line(f"unpinned {counted(len(done.tasks), 'task')}")
    _tell_new(session, "edit TASK --no-pin")


@command
def path(session: Session, what: Annotated[What, typer.Argument()] = "store") -> None:
    """Print a path, as `icm doctor --path` does."""
    found = path_of(session, what)
    session.out.document({"name": what, "path": str(found)})
    session.out.answer(str(found))
    _tell_new(session, f"doctor --path {what}")


@command
def formats(session: Session) -> None:
    """List the formats of adapters, as `icm convert --list-formats` does."""
    show_formats(session)
    _tell_new(session, "convert --list-formats")


@command
def serve_config(
    session: Session,
    engine: Annotated[Engine, argument("vllm|sglang")],
    bundle: FromOpt = None,
    base_model: ServedBaseOpt = None,
    gateway: GatewayOpt = False,
) -> None:
    """Print how to start an engine, as `icm serve --print-config` does."""
    print_config(session, engine, bundle, base_model, gateway=gateway)
    _tell_new(session, f"serve --print-config {engine}")
