"""The content of a report: savings, tasks, map, size against quality, and outputs of chosen tasks.

Reads rows, task vectors and file sizes. The base model and weights are read only for the outputs of chosen tasks, one
adapter at a time; torch is imported only then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.base_models.examples.prompts import read_prompts
from icmlora.errors import IcmLoraError
from icmlora.fleet.context import Context
from icmlora.fleet.failures import BaseUnavailable, Failed, FailureLog
from icmlora.fleet.map.picture import draw_map
from icmlora.fleet.map.task_map import map_of
from icmlora.fleet.report.facts import facts_of
from icmlora.fleet.report.page import DrawnMap, Page
from icmlora.fleet.report.rate_picture import rate_picture
from icmlora.fleet.report.summary import ReportSummary
from icmlora.fleet.report.task_table import task_table
from icmlora.fleet.stats.stats import bill_of
from icmlora.formats.catalogue import format_named
from registry.errors import DamagedStore
from registry.filters import Selection

if TYPE_CHECKING:
    from icmlora.fleet.map.task_map import MapReport
    from icmlora.fleet.report.outputs import TaskOutputs
    from icmlora.fleet.report.pictures import TaskPictures
    from icmlora.fleet.stats.bill import BaseModelBill, Bill
    from registry.manifests import Task
    from registry.store import Store

MAX_MAPPED = 1000
"""Tasks of a base model that are drawn on a map: its time and memory grow with their square."""


def page_of(store: Store, outputs: Sequence[TaskOutputs | TaskPictures], failures: Mapping[str, str]) -> Page:
    """Read everything else that is on the page."""
    bill = bill_of(store)
    return assembled(bill, {fleet.base_model: _map(store, fleet) for fleet in bill.fleets}, outputs, failures)


def assembled(
    bill: Bill,
    maps: Mapping[str, MapReport | str | None],
    outputs: Sequence[TaskOutputs | TaskPictures],
    failures: Mapping[str, str],
) -> Page:
    """Return the page for data that was read from a store.

    `maps` has for each base model its map, or why there is none, or None where no task has vectors; `failures` says why
    chosen tasks have no outputs.
    """
    found = {label: made for label, made in maps.items() if made is not None}
    mapped = {task.name: task for made in found.values() if not isinstance(made, str) for task in made.map.tasks}
    table = task_table(bill, mapped)
    return Page(
        facts=facts_of(bill),
        bill=bill,
        table=table,
        rate=rate_picture(bill, table.numbers),
        maps=[_drawn(label, made, table.numbers) for label, made in found.items()],
        outputs=outputs,
        failures=failures,
        made_by=f"icm {version('icm-lora')}",
    )


def _map(store: Store, fleet: BaseModelBill) -> MapReport | str | None:
    """Return the map of a base model's tasks, or why there is none; None if no task has vectors."""
    if not any(task.row.vectors for task in fleet.tasks):
        return None
    if len(fleet.tasks) > MAX_MAPPED:
        return f"a report maps at most {MAX_MAPPED:,} tasks per base model, but there are {len(fleet.tasks):,}"
    try:
        return map_of(store, fleet.base_model, store.tasks(Selection(base_model=fleet.base_model)), "adapted")
    # Damage is for `icm verify` to report; the rest of the page is still true.
    except (DamagedStore, IcmLoraError) as error:
        return str(error)


def _drawn(base_model: str, found: MapReport | str, numbers: Mapping[str, int]) -> DrawnMap:
    if isinstance(found, str):
        return DrawnMap(base_model, None, [found])
    return DrawnMap(base_model, draw_map(found.map, base_model, found.view, numbers), found.reasons)


def make_outputs(
    context: Context,
    store: Store,
    tasks: Sequence[Task],
    report: ReportSummary,
    prompts: Path | None,
    max_new_tokens: int,
    drawing: tuple[int, int, int | None],
    device: str,
) -> list[TaskOutputs | TaskPictures]:
    """Generate outputs for the chosen tasks. Failures are recorded in the report."""
    from icmlora.base_models.running.pipeline import Drawing
    from icmlora.fleet.report.outputs import task_outputs
    from icmlora.fleet.report.pictures import Studio, TaskPictures
    from icmlora.fleet.resources.loading import ModelCache
    from icmlora.io.devices import resolve_device

    given = None if prompts is None else read_prompts(prompts.read_bytes(), prompts)
    # The store is read-only, so new facts about base models are discarded.
    models = ModelCache(store, resolve_device(device), context.cache, on_facts=lambda facts: None)
    studio = Studio(models, given, Drawing(*drawing))
    failures, found = FailureLog(context, report, len(tasks)), dict[str, "TaskOutputs | TaskPictures"]()

    def answered(
        some: Iterable[Task],
    ) -> Iterator[tuple[Task, TaskOutputs | TaskPictures | Failed | BaseUnavailable]]:
        for task in some:
            context.progress(len(found), len(tasks), task.name)
            is_for_images = format_named(task.final.format).is_for_images
            made = studio.draw(task) if is_for_images else task_outputs(models, task, given, max_new_tokens)
            yield task, made

    labels = sorted({task.base_model for task in tasks})
    for label in labels:
        results: Iterator[tuple[Task, TaskOutputs | TaskPictures]] = failures.results(
            label, answered(task for task in tasks if task.base_model == label)
        )
        found |= {task.name: made for task, made in results}
    failures.check(len(labels))
    report.pictures = [made for made in found.values() if isinstance(made, TaskPictures)]
    return [found[task.name] for task in tasks if task.name in found]
