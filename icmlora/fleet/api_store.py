"""The methods of `Fleet` that list the store and maintain it. Only duplicates and outputs in a report need tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.fleet.bases.base_models import (
    add_base_model,
    alias_base_model,
    forget_base_model,
    list_base_models,
    separate_labels,
)
from icmlora.fleet.context import Context, Event, default_cache, ignore
from icmlora.fleet.map.map import map_fleet
from icmlora.fleet.report.report import write_report
from icmlora.fleet.stats.stats import stats
from icmlora.fleet.tasks.duplicates import find_duplicates
from icmlora.fleet.tasks.generators import forget_generator, list_generators, rollback
from icmlora.fleet.tasks.maintenance import examine, prune, repair_blobs, repair_rows, restore_database, verify
from icmlora.fleet.tasks.tasks import (
    edit_tasks,
    list_names,
    list_tags,
    list_tasks,
    plan_removal,
    remove_tasks,
    show_task,
)

if TYPE_CHECKING:
    pass


class StoredFleet(Context):
    """Open a store, list and maintain it. `icmlora.Fleet` explains the arguments."""

    def __init__(
        self,
        path: str | Path,
        *,
        cache: str | Path | Callable[[], Path] = default_cache,
        lock_timeout: float = 30.0,
        command: str = "icm",
        on_event: Callable[[Event], None] = ignore,
    ) -> None:
        cache = Path(cache) if isinstance(cache, str) else cache
        super().__init__(Path(path), cache, lock_timeout, command, on_event)

    @property
    def _context(self) -> Context:
        """What one use case works with: all its waits for other processes end at the timeout, together."""
        return self.with_patience()

    # tasks: list, show, remove

    tasks = list_tasks

    task_names = list_names

    show = show_task

    plan_removal = plan_removal

    remove = remove_tasks

    # tasks: names, tags, notes

    edit = edit_tasks

    tags = list_tags

    # base models

    base_models = list_base_models

    add_base_model = add_base_model

    forget_base_model = forget_base_model

    alias_base_model = alias_base_model

    separate_base_model = separate_labels

    # stats, map, duplicates, report

    stats = stats

    task_map = map_fleet

    duplicates = find_duplicates

    report = write_report

    # verify, prune, doctor

    verify = verify

    repair = repair_blobs

    repair_rows = repair_rows

    restore_database = restore_database

    prune = prune

    doctor = examine

    # generators

    generators = list_generators

    rollback = rollback

    forget_generator = forget_generator
