"""Encoding of which the process dies with a task; a worker imports it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

from icmlora.fleet.encode.report import TaskEncoded
from icmlora.fleet.encode.search import encode_tasks
from icmlora.fleet.resources.loading import ModelCache
from icmlora.fleet.resources.workers import OnProgress
from registry.manifests import Task
from tests.shared import paths_of

Results = Iterator[tuple[Task, TaskEncoded]]


def dies_once(
    models: ModelCache, tasks: Sequence[Task], on_progress: OnProgress, *limits: Any, **options: Any
) -> Results:
    """Its process dies with `poems` the first time, and leaves a file that says so."""
    died = paths_of(models.store).root.parent / "died"
    if tasks[0].name == "poems" and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_tasks(models, tasks, on_progress, *limits, **options)


def dies_always(
    models: ModelCache, tasks: Sequence[Task], on_progress: OnProgress, *limits: Any, **options: Any
) -> Results:
    """Its process dies with `poems` every time."""
    if tasks[0].name == "poems":
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_tasks(models, tasks, on_progress, *limits, **options)
