"""List and count tasks. Imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from icmlora.errors import DataError
from icmlora.fleet.context import Context, base_name, check_base_model, use_case
from icmlora.fleet.params import BaseModelName, Filters, Limit, Sort
from registry.filters import FIELDS, FilterField, Selection, parse_filter, parse_sort

if TYPE_CHECKING:
    from registry.store import Store
    from registry.tables import TaskRow


def filter_fields() -> Collection[FilterField]:
    """Return the fields that tasks can be filtered and sorted by."""
    return FIELDS.values()


@use_case
def list_tasks(
    context: Context,
    base_model: BaseModelName = None,
    *,
    filters: Filters = (),
    sort: Sort = None,
    limit: Limit = None,
) -> list[TaskRow]:
    """List the tasks in the store, or in a bundle with --from.

    ORIGINAL: size of the original; "evicted" if it was deleted, "none" if a bundle brought only the code.
    CODE: size of the code; "-" if there is none yet (run `icm train`), "original only" if there cannot be one
    (`icm show` gives the reason). GAIN and RELATIVE ERROR: measured quality of the code. A narrow terminal shows fewer
    columns. --quiet prints only names.

    A filter is FIELD, an operator (= != > >= < <= or ~ for contains) and a value; case does not matter. Fields: name,
    base, rank, size, code, extras, gain, error, tag, source, note, and status (evicted, pinned, coded, original-only,
    does-nothing, generated). Sizes take units: 10MB, 512KiB.

    Example:
      icm ls -F 'rank>=8' -F tag=prod -F 'base~llama' --sort size:desc --limit 20

    Raises:
        DataError: No task belongs to the base model.
        InvalidFilter: A filter or the order cannot be understood; the hint lists the fields.
    """
    selection = _selection(base_model, filters, sort, limit)
    with context.open(read_only=True) as store:
        return list(store.rows(of_base_model(store, selection)))


@use_case
def count_tasks(context: Context, base_model: str | None = None, *, filters: Sequence[str] = ()) -> int:
    """Return how many tasks `list_tasks` lists."""
    selection = _selection(base_model, filters)
    with context.open(read_only=True) as store:
        return store.count(of_base_model(store, selection))


@use_case
def list_tags(context: Context) -> Mapping[str, int]:
    """Return how many tasks have each tag, sorted by tag."""
    with context.open(read_only=True) as store:
        return store.tags()


def of_base_model(store: Store, selection: Selection) -> Selection:
    """Replace the label of a selection's base model by its name; raise `DataError` if it has no tasks."""
    base_model = base_name(store, selection.base_model)
    if base_model is not None:
        check_base_model(base_model, store.task_counts())
    return replace(selection, base_model=base_model)


def _selection(
    base_model: str | None, filters: Sequence[str], sort: str | None = None, limit: int | None = None
) -> Selection:
    """Read the filters and the order; raise `DataError` or `InvalidFilter`."""
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} tasks lists nothing", hint="use 1 or more")
    order = None if sort is None else parse_sort(sort)
    return Selection(base_model, tuple(map(parse_filter, filters)), order, limit)
