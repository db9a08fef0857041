"""`icm pin` and `icm unpin`: keep originals for good, or let them go."""

from __future__ import annotations

from icm_cli.options import TasksArg
from icm_cli.session import Session, command
from icmlora.io.text import counted


@command
def pin(session: Session, tasks: TasksArg) -> None:
    """Keep the originals of tasks for good: `icm evict` leaves them alone.

    Example:
      icm pin shakespeare
    """
    _set(session, tasks, pinned=True)


@command
def unpin(session: Session, tasks: TasksArg) -> None:
    """Let `icm evict` delete the originals of tasks again, if their codes keep enough.

    Example:
      icm unpin shakespeare
    """
    _set(session, tasks, pinned=False)


def _set(session: Session, tasks: list[str], *, pinned: bool) -> None:
    from icmlora.fleet.evict import set_pinned

    done = set_pinned(session.context, tasks, pinned=pinned)
    word = "pinned" if pinned else "unpinned"
    session.out.document({word: done.names})
    session.out.line(f"{word} {counted(len(done.names), 'task')}")
    if pinned and done.evicted:
        session.out.note(f"evicted before, so there is no original to keep: {', '.join(done.evicted)}")
