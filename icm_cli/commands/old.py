"""Deprecated commands, hidden from the help. Each still works and prints its replacement."""

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


def _print_deprecation(session: Session, new: str) -> None:
    fact = f"`{session.command}` is deprecated and will be removed in the next version"
    session.out.note(f"{fact}; use `icm {new}`")


@command
def mv(session: Session, task: TaskArg, new: Annotated[str, argument("NEW")]) -> None:
    """Rename a task, as `icm edit --name` does."""
    from icmlora.fleet.tasks.tasks import edit_tasks

    (done,) = edit_tasks(session.context, [task], name=new).tasks
    session.out.document({"old": task, "new": done.name})
    session.out.line(f"renamed {task} to {done.name}")
    _print_deprecation(session, "edit TASK --name NEW")


@command
def tag(
    session: Session,
    tasks: Annotated[list[str] | None, argument("[TASK]...", completes="task")] = None,
    add: Annotated[list[str] | None, option("--add -a TAG", completes="tag")] = None,
    remove: Annotated[list[str] | None, option("--remove -r TAG", completes="tag")] = None,
) -> None:
    """Add or remove tags, as `icm edit --tag` and `--untag` do. Without TASK, list tags as `icm ls --tags` does."""
    from icmlora.fleet.tasks.tasks import edit_tasks

    if not tasks:
        if add or remove:
            raise UsageProblem("no task given", hint="run `icm edit TASK... --tag TAG`; `icm ls` lists the tasks")
        list_tags(session)
        _print_deprecation(session, "ls --tags")
        return
    done = edit_tasks(session.context, tasks, add_tags=add or (), remove_tags=remove or ()).tasks
    session.out.document([{"task": task.name, "tags": list(task.tags)} for task in done])
    for task in done:
        session.out.answer(f"{task.name}: {', '.join(task.tags) or 'no tags'}")
    _print_deprecation(session, "edit TASK --tag TAG --untag TAG")


@command
def note(
    session: Session,
    task: TaskArg,
    text: Annotated[str | None, argument("[TEXT]")] = None,
    clear: Annotated[bool, option("--clear", "Remove the note.")] = False,
) -> None:
    """Set the note of a task, as `icm edit --note` does. Without TEXT, print it."""
    from icmlora.fleet.tasks.tasks import edit_tasks

    if text is not None and clear:
        raise UsageProblem("TEXT and --clear cannot be used together", hint="omit one of them")
    (done,) = edit_tasks(session.context, [task], note=False if clear else text).tasks
    session.out.document({"task": done.name, "note": done.note})
    if done.note is None:
        session.out.note(f"{done.name} has no note")
    elif text is None:
        session.out.answer(done.note)
    else:
        session.out.note(f"set the note of {done.name}")
    _print_deprecation(session, "edit TASK --note TEXT" if clear or text is not None else "show TASK")


@command
def pin(session: Session, tasks: TasksArg) -> None:
    """Protect originals from `icm evict`, as `icm edit --pin` does."""
    from icmlora.fleet.tasks.tasks import edit_tasks

    done = edit_tasks(session.context, tasks, pinned=True)
    session.out.document({"pinned": [task.name for task in done.tasks]})
    session.out.line(f"pinned {counted(len(done.tasks), 'task')}")
    if done.evicted:
        session.out.note(f"already evicted, no original to pin: {', '.join(done.evicted)}")
    _print_deprecation(session, "edit TASK --pin")


@command
def unpin(session: Session, tasks: TasksArg) -> None:
    """Allow `icm evict` to delete originals again, as `icm edit --no-pin` does."""
    from icmlora.fleet.tasks.tasks import edit_tasks

    done = edit_tasks(session.context, tasks, pinned=False)
    session.out.document({"unpinned": [task.name for task in done.tasks]})
    session.out.line(f"unpinned {counted(len(done.tasks), 'task')}")
    _print_deprecation(session, "edit TASK --no-pin")


@command
def path(session: Session, what: Annotated[What, typer.Argument()] = "store") -> None:
    """Print a path, as `icm doctor --path` does."""
    found = path_of(session, what)
    session.out.document({"name": what, "path": str(found)})
    session.out.answer(str(found))
    _print_deprecation(session, f"doctor --path {what}")


@command
def formats(session: Session) -> None:
    """List the adapter formats, as `icm convert --list-formats` does."""
    show_formats(session)
    _print_deprecation(session, "convert --list-formats")


@command
def serve_config(
    session: Session,
    engine: Annotated[Engine, argument("vllm|sglang")],
    bundle: FromOpt = None,
    base_model: ServedBaseOpt = None,
    gateway: GatewayOpt = False,
) -> None:
    """Print the commands that start an engine, as `icm serve --print-config` does."""
    print_config(session, engine, bundle, base_model, gateway=gateway)
    _print_deprecation(session, f"serve --print-config {engine}")
