"""Shell completion of task names, base models, tags, formats, and the filters and sort fields of `icm ls`.

Completion must never print an error, so a function that fails offers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from icmlora.fleet.context import Context


def _quietly(complete: Callable[[str], Iterable[str]]) -> Callable[[str], list[str]]:
    @wraps(complete)
    def answer(incomplete: str) -> list[str]:
        try:
            return [word for word in complete(incomplete) if word.lower().startswith(incomplete.lower())]
        except Exception:
            return []

    return answer


@_quietly
def complete_task(incomplete: str) -> Iterable[str]:
    """Return task names that start with the typed text."""
    from icmlora.fleet.tasks.listing import list_tasks

    # The filter runs in the database, so a large fleet is not read into this process.
    return [row.name for row in list_tasks(_context(), filters=[f"name~{incomplete}"] if incomplete else [])]


@_quietly
def complete_base(incomplete: str) -> Iterable[str]:
    """Return base model names that start with the typed text."""
    return _values("base")


@_quietly
def complete_tag(incomplete: str) -> Iterable[str]:
    """Return tags that start with the typed text."""
    return _values("tag")


@_quietly
def complete_filter(incomplete: str) -> Iterable[str]:
    """Return fields with their operators, and after an operator the values in the store."""
    from icmlora.fleet.tasks.listing import filter_fields

    for field in filter_fields():
        operators = sorted(field.operators, key=len, reverse=True)  # `>=` before `>`
        typed = next((sign for sign in operators if incomplete.lower().startswith(f"{field.name}{sign}")), None)
        if typed is None:
            yield from (f"{field.name}{sign}" for sign in field.operators)
        else:
            yield from (f"{field.name}{typed}{value}" for value in field.choices or _values(field.name))


@_quietly
def complete_sort(incomplete: str) -> Iterable[str]:
    """Return the sort fields, ascending and descending."""
    from icmlora.fleet.tasks.listing import filter_fields

    for field in filter_fields():
        if field.can_be_sorted:
            yield from (field.name, f"{field.name}:desc")


@_quietly
def complete_format(incomplete: str) -> Iterable[str]:
    """Return the names of the adapter formats."""
    from icmlora.formats import catalogue

    return [known.name for known in catalogue.FORMATS]


def _values(field: str) -> Iterable[str]:
    """Return the values of a field in the store, or none for fields with too many values."""
    from icmlora.fleet.bases.base_models import list_base_models
    from icmlora.fleet.tasks.listing import list_tags, list_tasks

    match field:
        case "name":
            return [row.name for row in list_tasks(_context())]
        case "base":
            return [known.base.name for known in list_base_models(_context())]
        case "tag":
            return list_tags(_context())
    return ()


def _context() -> Context:
    from icm_cli.config import cache_folder, load_settings
    from icmlora.fleet.context import Context, address_of

    return Context(address_of(load_settings().store.value), cache_folder, lock_timeout=0.0, command="icm completion")
