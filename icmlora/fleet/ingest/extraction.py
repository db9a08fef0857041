"""Find ingested tasks without task vectors, and extract those whose base model is on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from icmlora.base_models.catalogue import modality_of
from icmlora.errors import AdapterRefused, BaseModelMismatch, BaseModelNotFound, BaseModelUnsuited, Cancelled, DataError
from icmlora.fleet.context import Context, TaskFailed, locate_base
from icmlora.fleet.failures import skipped_base
from icmlora.fleet.vectors.vectors import VectorReport, extract_vectors
from icmlora.formats.catalogue import format_named

if TYPE_CHECKING:
    from icmlora.fleet.ingest.report import IngestReport
    from registry.store import Store


def note_missing_vectors(store: Store | None, report: IngestReport) -> dict[str, str]:
    """Report the tasks without task vectors that could have some; return task -> base model of those to extract."""
    if store is None:
        return {}
    possible = [task for task in report.done if task.original_only is None]
    names = {task.task for task in possible if not format_named(task.format).is_for_images}
    base_models = {row.name: row.base for row in store.rows_of(names=names) if row.vectors == 0}
    can_run = {label: _can_run(store, label) for label in set(base_models.values())}
    report.without_vectors = [name for name, label in base_models.items() if can_run[label] is not False]
    report.bases_not_found = sorted(label for label, found in can_run.items() if found is None)
    # A base model that cannot be run is tried too, and reports why. `--restore` skips vector extraction.
    names -= {task.task for task in possible if task.restored and not task.new}
    return {name: label for name, label in base_models.items() if can_run[label] is not None and name in names}


def _can_run(store: Store, label: str) -> bool | None:
    """Return whether icm can run a base model; None if it is not on this machine."""
    try:
        modality_of(locate_base(store, label))
    except BaseModelNotFound:
        return None
    except BaseModelUnsuited:
        return False
    return True


def extract(context: Context, report: IngestReport, tasks: Mapping[str, str], device: str) -> None:
    """Extract the vectors of tasks, and report failures: the adapters are in the store already."""
    try:
        report.vectors = extract_vectors(context, list(tasks), device=device)
    except (BaseModelMismatch, DataError, AdapterRefused) as error:  # of the only task
        failure = TaskFailed(next(iter(tasks)), "vectors", error.message, error.hint)
        report.vectors = VectorReport(failed=[failure])
        context.on_event(failure)
    except BaseModelNotFound as error:  # none of them can be loaded
        bases = {label: [name for name in tasks if tasks[name] == label] for label in tasks.values()}
        report.vectors = VectorReport(skipped=[skipped_base(label, names, error) for label, names in bases.items()])
    except Cancelled as stop:
        report.vectors = stop.report if isinstance(stop.report, VectorReport) else VectorReport()
        raise
    finally:
        done = set() if report.vectors is None else {entry.task for entry in report.vectors.done}
        report.without_vectors = [task for task in report.without_vectors if task not in done]
