"""`icm context`: samples that stand before the requests for a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icm_cli.errors import Interrupted, UsageProblem
from icm_cli.guard_report import guard_json, tell_guard
from icm_cli.options import DeviceOpt, TaskArg, option
from icm_cli.session import Session, command
from icmlora.errors import Cancelled
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.few_shot.task_context import ContextReport

SamplesOpt = Annotated[
    Path | None, option("--samples FILE", "Samples of the task, as for `icm generate`. Default: the task's own.")
]
CountOpt = Annotated[int, option("--count K", "Choose from at most K samples, spread over the file.", min=1)]
TokensOpt = Annotated[int, option("--tokens N", "Take at most N tokens.", min=16)]
ShowOpt = Annotated[bool, option("--show", "Print the context that the task has.")]
RemoveOpt = Annotated[bool, option("--remove", "Forget the context of the task.")]


@command
def context(
    session: Session,
    task: TaskArg,
    samples: SamplesOpt = None,
    count: CountOpt = 64,
    tokens: TokensOpt = 1536,
    show: ShowOpt = False,
    remove: RemoveOpt = False,
    device: DeviceOpt = None,
) -> None:
    """Choose samples that stand before the requests for a task, and measure what they are worth.

    A base model that reads a few samples before a request often does better, with an adapter too. icm takes as many as
    fit, or longer, shorter or fewer ones where other samples show that these are better. The context is kept with the
    adapter: `icm materialize` writes context.txt and, for chats, context.json, and `icm serve` puts it before requests
    that ask for it. It needs the base model.

    Example:
      icm context shakespeare --samples plays.jsonl
      icm context shakespeare --show
    """
    if show and remove:
        raise UsageProblem("a context is either shown or removed", hint="leave out --show or --remove")
    if show:
        _show(session, task)
    elif remove:
        _remove(session, task)
    else:
        _choose(session, task, samples, count, tokens, device)


def _choose(session: Session, task: str, samples: Path | None, count: int, tokens: int, device: str | None) -> None:
    from icmlora.fleet.few_shot.task_context import set_context

    try:
        with session.working("context") as context:
            done = set_context(
                context, task, samples=samples, count=count, tokens=tokens, device=session.device(device)
            )
    except Cancelled as stop:
        raise Interrupted("interrupted; nothing has changed", hint="run the same command again") from stop
    _tell(session, done)


def _tell(session: Session, done: ContextReport) -> None:
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
        f"{done.task}: a context of {counted(done.samples, 'sample')}, {counted(done.tokens, 'token')}, "
        f"{human_size(done.size)} in the store"
    )
    tell_guard(session, done.guard)


def _show(session: Session, task: str) -> None:
    from icmlora.fleet.few_shot.task_context import task_context

    found = task_context(session.context, task)
    session.out.document(
        {"task": task, "text": None if found is None else found.text, "messages": found and list(found.messages)}
    )
    if found is None:
        session.out.note(f"{task} has no context: `icm context {task}` chooses one")
    elif found.text:
        session.out.answer(found.text.rstrip("\n"))
    else:
        for message in found.messages:
            session.out.line(f"{message['role']}: {message['content']}")


def _remove(session: Session, task: str) -> None:
    from icmlora.fleet.few_shot.task_context import remove_context

    removed = remove_context(session.context, task)
    session.out.document({"task": task, "removed": removed})
    session.out.note(f"{task}: the context is removed" if removed else f"{task} has no context")
