"""`icm context`: choose samples to place at the start of every prompt of a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icm_cli.command import plain_command as command
from icm_cli.errors import Interrupted, UsageProblem
from icm_cli.guard_report import guard_json, print_guard
from icm_cli.options import DeviceOpt, TaskArg, option
from icm_cli.session import Session
from icmlora.errors import Cancelled
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.few_shot.task_context import ContextReport

SamplesOpt = Annotated[
    Path | None,
    option("--samples FILE", "Samples in the format of `icm generate`. Default: the samples stored with the task."),
]
CountOpt = Annotated[int, option("--count K", "Choose from at most K samples, evenly spaced in the file.", min=1)]
TokensOpt = Annotated[int, option("--tokens N", "Maximum length of the context in tokens.", min=16)]
ShowOpt = Annotated[bool, option("--show", "Print the current context of the task.")]
RemoveOpt = Annotated[bool, option("--remove", "Remove the context of the task.")]


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
    """Choose example samples to place at the start of every prompt.

    A few samples in the prompt often improve results, with or without an adapter. By default, as many samples as fit
    are used. Longer, shorter or fewer samples are chosen if they score better on the other samples. The context is
    stored with the adapter. `icm materialize` writes it to context.txt and, for chats, context.json. `icm serve` adds
    it to requests that ask for it. Needs the base model.


    Example:
      icm context shakespeare --samples plays.jsonl
      icm context shakespeare --show
    """
    if show and remove:
        raise UsageProblem("--show and --remove cannot be used together", hint="omit one of them")
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


def _show(session: Session, task: str) -> None:
    from icmlora.fleet.few_shot.task_context import task_context

    found = task_context(session.context, task)
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


def _remove(session: Session, task: str) -> None:
    from icmlora.fleet.few_shot.task_context import remove_context

    removed = remove_context(session.context, task)
    session.out.document({"task": task, "removed": removed})
    session.out.note(f"removed the context of {task}" if removed else f"{task} has no context")
