"""Run functions in processes of their own, to kill them or to let them run at the same time."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

KILLED = -signal.SIGKILL


def start(function: Callable[[], object]) -> int:
    """Begin `function` in a child process and return its pid; nothing of this process runs there afterwards."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def wait(pid: int) -> int:
    """Return the exit status of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(function: Callable[[], object], *, failpoint: str | None = None) -> int:
    """Run `function` in a child, killed at `failpoint` if it comes there, and return the exit status."""

    def child() -> None:
        if failpoint is not None:
            os.environ["ICM_FAILPOINT"] = failpoint
        function()

    return wait(start(child))


def run_together(*functions: Callable[[], object]) -> list[int]:
    """Run functions at the same time and return their exit statuses."""
    return [wait(pid) for pid in [start(function) for function in functions]]
