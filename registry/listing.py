"""Turn a selection of tasks into SQL: one builder for every listing, filter and order, in both databases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from decimal import Decimal
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, false, func, not_, or_, select

from registry.filters import Filter, Selection
from registry.tables import REFS, TaskRow

ROW = tuple(REFS.c[one.name] for one in fields(TaskRow))
"""The columns of a `TaskRow`, in its order."""
IS_TASK = REFS.c.kind == "task"

_COLUMNS: Mapping[str, ColumnElement[Any]] = {
    "name": func.lower(REFS.c.name),
    "base": func.lower(REFS.c.base),
    "rank": REFS.c.rank,
    "size": REFS.c.original_bytes,
    "code": REFS.c.code_size,
    "extras": REFS.c.extras_bytes,
    "gain": REFS.c.gain,
    "error": REFS.c.squared_error,
    "tag": func.lower(REFS.c.tags),
    "source": func.lower(REFS.c.source),
    "note": func.lower(func.coalesce(REFS.c.note, "")),
}
_STATUSES: Mapping[str, ColumnElement[bool]] = {
    "evicted": REFS.c.evicted_at.is_not(None),
    "pinned": REFS.c.pinned,
    "coded": REFS.c.code_size.is_not(None),
    "original-only": REFS.c.original_only.is_not(None),
    "does-nothing": REFS.c.does_nothing,
    "generated": REFS.c.is_generated,
}


def selected(selection: Selection, names_of: Mapping[str, Sequence[str]], *columns: ColumnElement[Any]) -> Select[Any]:
    """Return the statement that selects columns of some tasks, in the order asked for.

    Args:
        selection: Which tasks. Its base model is a name, not another label.
        names_of: Base model -> all its names; a filter on `base` compares every one.
        columns: By default the columns of a `TaskRow`.
    """
    conditions = [_condition(one, names_of) for one in selection.filters]
    if selection.base_model is not None:
        conditions.append(REFS.c.base == selection.base_model)
    if selection.endings:
        key, by_length = REFS.c.key, defaultdict[int, list[str]](list)
        for ending in selection.endings:
            by_length[len(ending)].append(ending)
        conditions.append(
            or_(*(func.substr(key, func.length(key) - size + 1).in_(some) for size, some in by_length.items()))
        )
    query = select(*(columns or ROW)).where(IS_TASK, *conditions)
    if selection.sort is not None:
        value = _COLUMNS[selection.sort.field.name]
        query = query.order_by(value.is_(None), value.desc() if selection.sort.descending else value)
    return query.order_by(REFS.c.key).limit(selection.limit)


def _condition(one: Filter, names_of: Mapping[str, Sequence[str]]) -> ColumnElement[bool]:
    """Return the condition of a filter. A task without a value passes only `!=`."""
    if one.operator == "!=":
        is_equal = _condition(Filter(one.field, "=", one.value), names_of)
        return not_(func.coalesce(is_equal, False))
    if one.field.name == "base":
        names = {base: [name.lower() for name in names] for base, names in names_of.items()}
        matches = (lambda name: one.value in name) if one.operator == "~" else (lambda name: name == one.value)
        return REFS.c.base.in_([base for base, all_names in names.items() if any(map(matches, all_names))])
    if one.field.name == "status":
        words = [word for word in _STATUSES if word == one.value or (one.operator == "~" and str(one.value) in word)]
        return or_(false(), *(_STATUSES[word] for word in words))
    column = _COLUMNS[one.field.name]
    if one.field.name == "tag":
        return column.contains(f" {one.value} " if one.operator == "=" else str(one.value), autoescape=True)
    if one.operator == "~":
        return column.contains(str(one.value), autoescape=True)
    value = one.value
    if one.field.name == "error":  # the column has squares
        exact = Decimal(repr(float(value)))  # 0.1 * 0.1 is more than 0.01, and the root of the column is 0.1
        value = float(exact * abs(exact))
    compared: Mapping[str, ColumnElement[bool]] = {
        "=": column == value,
        "<": column < value,
        "<=": column <= value,
        ">": column > value,
        ">=": column >= value,
    }
    return and_(column.is_not(None), compared[one.operator])
