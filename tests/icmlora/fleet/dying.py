"""Encoders whose process dies with a task; a worker imports them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from icmlora.fleet.encode.encode import Encoder, MadeCode, MadeResidual, TaskEncoded
from registry.records import TaskRecord

Tell = Callable[[str], None]


class DiesOnce(Encoder):
    """Its process dies with `poems` the first time, and leaves a file that says so."""

    def __call__(self, planned: TaskRecord, tell: Tell) -> TaskEncoded | MadeCode | MadeResidual:
        died = self._store.paths.root.parent / "died"
        if planned.name == "poems" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(planned, tell)


class DiesAlways(Encoder):
    """Its process dies with `poems` every time."""

    def __call__(self, planned: TaskRecord, tell: Tell) -> TaskEncoded | MadeCode | MadeResidual:
        if planned.name == "poems":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(planned, tell)
