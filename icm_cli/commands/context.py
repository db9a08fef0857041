"""`icm context`: choose samples to place at the start of every prompt of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from icm_cli.command import Call, command
from icm_cli.errors import Interrupted, UsageProblem
from icm_cli.guard_report import guard_json, print_guard
from icm_cli.session import Session
from icmlora.errors import Cancelled
from icmlora.fleet.few_shot.task_context import remove_context, set_context, task_context
from icmlora.fleet.params import Param
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.base_models.examples.context import TaskContext
    from icmlora.fleet.few_shot.generated import ContextReport

ShowOpt = Annotated[bool, Param("Print the current context of the task.", "--show")]
RemoveOpt = Annotated[bool, Param("Remove the context of the task.", "--remove")]


@command(set_context)
def context(session: Session, call: Call[ContextReport], show: ShowOpt = False, remove: RemoveOpt = False) -> None:
    if show and remove:
        raise UsageProblem("--show and --remove cannot be used together", hint="omit one of them")
    if show:
        _show(session, call.of(task_context, "--show"))
    elif remove:
        removed, task = call.of(remove_context, "--remove").now(), call["task"]
        session.out.document({"task": task, "removed": removed})
        session.out.note(f"removed the context of {task}" if removed else f"{task} has no context")
    else:
        try:
            done = call.run(label="context")
        except Cancelled as stop:
            raise Interrupted("interrupted; nothing was changed", hint="run the same command again") from stop
        _print_report(session, done)


def _print_report(session: Session, done: ContextReport) -> None:
    out = session.out
    out.document(
        {
            "task": done.task,
            "samples_count": done.samples,
            "tokens": done.tokens,
            "size": done.size,
            "measured": guard_json(done.guard),
            "precision": done.precision,
        }
    )
    out.note(
        f"stored a context for {done.task}: {counted(done.samples, 'sample')}, {counted(done.tokens, 'token')}, "
        f"{human_size(done.size)}"
    )
    print_guard(session, done.guard)


def _show(session: Session, call: Call[TaskContext | None]) -> None:
    found, task = call.now(), call["task"]
    session.out.document(
        {"task": task, "text": None if found is None else found.text, "messages": found and list(found.messages)}
    )
    if found is None:
        session.out.note(f"{task} has no context")
        session.out.hint(f"run `icm context {task}` to choose one")
    elif found.text:
        session.out.answer(found.text.rstrip("\n"))
    else:
        for message in found.messages:
            session.out.line(f"{message['role']}: {message['content']}")
