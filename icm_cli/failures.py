"""Tell which tasks and base models something was wrong with, while a command went on with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from icmlora.io.text import counted, some

if TYPE_CHECKING:
    from icm_cli.output import Output
    from icm_cli.session import Session
    from icmlora.fleet.context import Event
    from icmlora.fleet.failures import BaseModelLeftOut


def tell_failure(session: Session, event: Event) -> None:
    """Report one task, or one base model, that something is wrong with, while the others go on."""
    from icmlora.fleet.context import TaskFailed
    from icmlora.fleet.failures import BaseModelFailed

    if not isinstance(event, TaskFailed | BaseModelFailed):
        return
    name = event.task if isinstance(event, TaskFailed) else event.base_model
    place = {"task": name} if isinstance(event, TaskFailed) else {"base_model": name}
    session.out.warn(f"{name}: {event.message}", kind=event.kind, **place, hint=event.hint)
    if event.hint is not None:
        session.out.hint(event.hint)


def tell_vectors(session: Session, event: Event) -> None:
    """Report one task whose vectors are stored, or one that failed."""
    from icmlora.fleet.vectors.vectors import VectorsExtracted

    tell_failure(session, event)
    if isinstance(event, VectorsExtracted):
        session.out.event("vectors", **asdict(event))
        source = "its samples" if event.source == "samples" else "probe texts"
        session.out.detail(f"{event.task}: {event.vectors} vectors from {source}")
        if event.skipped is not None:
            session.out.detail(f"{event.task}: {event.skipped}")


def tell_left_out(out: Output, left_out: Sequence[BaseModelLeftOut], what: str) -> bool:
    """Print what was left out, and return whether some of it ought to work.

    Args:
        out: Where to print.
        left_out: Base models with their tasks.
        what: What was not done with the tasks, as "not measured".
    """
    for base in left_out:
        text = left_out_text(base, what)
        if base.is_unsuited:
            out.event("left_out", **asdict(base))
            out.note(text)
            continue
        fields = {"base_model": base.base_model, "tasks": list(base.tasks), "hint": base.hint}
        out.warn(text, kind="base_model_left_out", **fields)
        if base.hint is not None:
            out.hint(base.hint)
    return any(not base.is_unsuited for base in left_out)


def left_out_text(base: BaseModelLeftOut, what: str) -> str:
    """Say which tasks of a base model were left out, and why."""
    return f"{what}: {counted(len(base.tasks), 'task')} ({some(base.tasks)}), because {base.reason}"
