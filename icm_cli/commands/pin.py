"""`icm pin` and `icm unpin`: keep originals, or allow `icm evict` to delete them again."""

from __future__ import annotations

from icm_cli.options import TasksArg
from icm_cli.session import Session, command
from icmlora.io.text import counted


@command
def pin(session: Session, tasks: TasksArg) -> None:
    """Keep the originals of tasks: `icm evict` will not delete them.

    Example:
      icm pin shakespeare
    """
    from icmlora.fleet.tasks.tasks import pin

    done = pin(session.context, tasks)
    session.out.document({"pinned": done.names})
    session.out.line(f"pinned {counted(len(done.names), 'task')}")
    if done.evicted:
        session.out.note(f"already evicted, so there is no original to keep: {', '.join(done.evicted)}")


@command
def unpin(session: Session, tasks: TasksArg) -> None:
    """Allow `icm evict` to delete the originals of tasks again.

    Example:
      icm unpin shakespeare
    """
    from icmlora.fleet.tasks.tasks import unpin

    done = unpin(session.context, tasks)
    session.out.document({"unpinned": done.names})
    session.out.line(f"unpinned {counted(len(done.names), 'task')}")
