"""Print failed and skipped tasks and base models while a command continues."""

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


def print_failure(session: Session, event: Event) -> None:
    """Print a warning for a failed task or base model."""
    from icmlora.fleet.context import TaskFailed
    from icmlora.fleet.failures import BaseModelFailed

    if not isinstance(event, TaskFailed | BaseModelFailed):
        return
    name = event.task if isinstance(event, TaskFailed) else event.base_model
    subject = {"task": name} if isinstance(event, TaskFailed) else {"base_model": name}
    session.out.warn(f"{name}: {event.message}", kind=event.kind, **subject, hint=event.hint)
    if event.hint is not None:
        session.out.hint(event.hint)


def print_vectors_event(session: Session, event: Event) -> None:
    """Print the result of vector extraction for a task."""
    from icmlora.fleet.vectors.vectors import ExtractionTakesLong, VectorsExtracted

    print_failure(session, event)
    if isinstance(event, ExtractionTakesLong):
        minutes = round(event.seconds / 60)
        time = counted(minutes, "minute") if minutes < 100 else counted(round(minutes / 60), "hour")
        session.out.note(f"extracting the task vectors of {counted(event.tasks, 'more task')} takes about {time}")
        kept = "adapters and finished vectors are kept, and `icm vectors` extracts the rest later"
        session.out.hint(f"press Ctrl-C to stop: {kept}; `icm ingest --no-vectors` skips this step")
    if isinstance(event, VectorsExtracted):
        session.out.event("vectors", **asdict(event))
        source = "its samples" if event.source == "samples" else "probe texts"
        session.out.detail(f"{event.task}: {event.vectors} vectors from {source}")
        if event.skipped is not None:
            session.out.detail(f"{event.task}: {event.skipped}")


def print_skipped(out: Output, skipped: Sequence[BaseModelLeftOut], missing: str) -> bool:
    """Print base models and their tasks that a command skipped. Return whether any of them should have worked.

    Args:
        out: Where to print.
        skipped: Base models with their tasks.
        missing: The missing result, such as "no measurements".
    """
    for base in skipped:
        text = skipped_text(base, missing)
        if base.is_unsuited:
            out.event("left_out", **asdict(base))
            out.note(text)
            continue
        fields = {"base_model": base.base_model, "tasks": list(base.tasks), "hint": base.hint}
        out.warn(text, kind="base_model_left_out", **fields)
        if base.hint is not None:
            out.hint(base.hint)
    return any(not base.is_unsuited for base in skipped)


def skipped_text(base: BaseModelLeftOut, missing: str) -> str:
    """Return a line with the skipped tasks of a base model and the reason."""
    return f"{missing} for {counted(len(base.tasks), 'task')} ({some(base.tasks)}): {base.reason}"
