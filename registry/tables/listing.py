"""Which tasks a selection lists, so that a fleet of a million is filtered and sorted without being loaded.

    database ──▶ tasks by name, with the stored values of the fields asked for ──▶ what they mean ──▶ filters ──▶ order

Databases differ in the case of letters, in roots and in JSON. So they join, and Python compares.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from registry.filters import Filter, Selection, Sort
from registry.names import UNKNOWN_BASE
from registry.records import Description, read_description
from registry.storage.database import Columns
from registry.values import PACKED, RUNGS

_Row = tuple[Any, ...]
_Test = Callable[[_Row], bool]


def selected(columns: Columns, selection: Selection, without: Collection[int]) -> Sequence[int]:
    """Return the numbers of the selected tasks in the order asked for, `without` some that no limit counts."""
    statement = _Statement(columns)
    tests = [_test(one, statement) for one in selection.filters]
    value = None if selection.sort is None else statement.field(selection.sort.field.name)
    is_short = selection.sort is None and selection.limit is not None
    rows = (row for row in statement.rows(selection.base_model, first=is_short) if row[0] not in without)
    passing = (row for row in rows if all(test(row) for test in tests))
    if selection.sort is None or value is None:
        return [row[0] for row in islice(passing, selection.limit)]
    found = ((value(row), row[0]) for row in passing)
    return [number for _, number in _in_order(found, selection.sort, selection.limit)]


def _in_order(found: Iterable[tuple[Any, int]], sort: Sort, limit: int | None) -> list[tuple[Any, int]]:
    """Return the first of some values with the numbers of their tasks. Equal ones keep their order, None is last."""

    def key(one: tuple[Any, int]) -> tuple[bool, Any]:
        return (one[0] is None) != sort.descending, one[0]

    if limit is None:
        return sorted(found, key=key, reverse=sort.descending)
    return (heapq.nlargest if sort.descending else heapq.nsmallest)(limit, found, key)


# Filters, as tests of a row.

_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "~": operator.contains,
}


def _test(one: Filter, statement: _Statement) -> _Test:
    if one.operator == "!=":
        is_equal = _test(Filter(one.field, "=", one.value), statement)
        return lambda row: not is_equal(row)
    compared, wanted = _COMPARED[one.operator], one.value
    if one.field.name == "base":
        names = statement.names_of_base()
        return lambda row: any(compared(name, wanted) for name in names(row))
    if one.field.kind == "words" and one.operator == "=":
        compared, wanted = operator.contains, f" {one.value} "  # words have a space on either side
    value = statement.field(one.field.name)

    def test(row: _Row) -> bool:
        found = value(row)
        return found is not None and compared(found, wanted)

    return test


# What is read of each task for a field, and what it means.


@dataclass(frozen=True)
class _Field:
    """One field: what is selected for it, which joins that takes, and the value, None for a task that lacks it."""

    stored: tuple[str, ...]
    joins: tuple[str, ...]
    value: Callable[..., Any]  # of what many tasks share, and of what is stored


_JOINS = {
    "final": "adapters AS final ON final.task_id = tasks.id AND final.is_final",
    "weights": "blobs AS weights ON weights.id = final.weights_id",
    "config": "blobs AS config ON config.id = final.config_id",
    "card": "blobs AS card ON card.id = final.card_id",
    "codes": "codes ON codes.task_id = tasks.id AND codes.generator_id ="
    " (SELECT id FROM generators WHERE generators.base_model_id = tasks.base_model_id AND is_current)",
    "code": "blobs AS code ON code.id = codes.blob_id",
    "residual": "blobs AS residual ON residual.id = codes.residual_id",
}
"""All that are needed, in this order."""


class _Statement:
    """The statement that reads some fields of all tasks, as far as they have been asked for."""

    def __init__(self, columns: Columns) -> None:
        self._columns, self._shared = columns, _Shared(columns)
        self._stored = ["tasks.id"]
        self._joins = set[str]()

    def field(self, name: str) -> Callable[[_Row], Any]:
        """Ask for a field, and return what takes its value from a row."""
        field, shared = _FIELDS[name], self._shared
        place = self._place_of(field)
        if len(field.stored) == 1:
            (at,) = range(place.start, place.stop)
            return lambda row: field.value(shared, row[at])
        return lambda row: field.value(shared, *row[place])

    def names_of_base(self) -> Callable[[_Row], Sequence[str]]:
        """Ask for all names of the base model, and return what takes them from a row."""
        names, at = self._shared.names_of, self._place_of(_FIELDS["base"]).start
        return lambda row: names(row[at])

    def rows(self, base_model: str | None, *, first: bool) -> Iterator[_Row]:
        """Yield the number of each task, or of those of one base model, and what was asked for, by name.

        If most often the `first` ones are enough, these come soon.
        """
        joins = "".join(f" LEFT JOIN {join}" for name, join in _JOINS.items() if name in self._joins)
        of = "" if base_model is None else " WHERE tasks.base_model_id = (SELECT id FROM base_models WHERE name = ?)"
        order = self._columns.in_any_case("tasks.name")
        statement = f"SELECT {', '.join(self._stored)} FROM tasks{joins}{of} ORDER BY {order}"  # noqa: S608
        return self._columns.stream(statement, () if base_model is None else (base_model,), first=first)

    def _place_of(self, field: _Field) -> slice:
        start = len(self._stored)
        self._stored += field.stored
        self._joins.update(field.joins)
        return slice(start, len(self._stored))


class _Shared:
    """What many tasks have in common: each is read once."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._descriptions: dict[int | None, Description | None] = {None: None}

    def description(self, number: int | None) -> Description | None:
        """Return a description, without its layout."""
        if number not in self._descriptions:
            row = self._columns.execute("SELECT body FROM documents WHERE id = ?", (number,)).fetchone()
            found = None if row is None else read_description(PACKED.read(row[0]))
            self._descriptions[number] = None if found is None else found._replace(layout=())
        return self._descriptions[number]

    def names_of(self, base_model: int) -> Sequence[str]:
        """Return all names of a base model in lower case, its own first."""
        return self._names.get(base_model, ())

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        found = defaultdict[int, list[str]](list)
        for query in ("SELECT id, name FROM base_models", "SELECT base_model_id, label FROM base_labels"):
            for number, name in self._columns.execute(query):
                found[number].append(name.casefold())
        return found


def _text(shared: _Shared, text: str | None) -> str | None:
    return text.casefold() if isinstance(text, str) else None


def _text_or_empty(shared: _Shared, text: str | None) -> str | None:
    return "" if text is None else _text(shared, text)


def _number(shared: _Shared, number: float | None) -> float | None:
    return number if isinstance(number, (int, float)) else None


def _root(shared: _Shared, squared: float | None) -> float | None:
    return math.sqrt(max(squared, 0.0)) if isinstance(squared, (int, float)) else None


def _base(shared: _Shared, base_model: int) -> str | None:
    return next(iter(shared.names_of(base_model)), None)


def _rank(shared: _Shared, described: int | None) -> int | None:
    common = shared.description(described)
    return None if common is None else common.rank_max


def _words(shared: _Shared, words: str | None) -> str:
    return f" {words} ".lower() if words else "  "


def _status(
    shared: _Shared,
    evicted_at: int | None,
    pinned: bool,
    code: int | None,
    described: int | None,
    base_model: int,
    is_generated: bool | None,
) -> str:
    common = shared.description(described)
    is_original_only = common is not None and common.original_only is not None
    states = {
        "evicted": evicted_at is not None,
        "pinned": pinned,
        "coded": code is not None,
        "original-only": is_original_only or _base(shared, base_model) == UNKNOWN_BASE,
        "does-nothing": common is not None and common.does_nothing,
        "generated": is_generated,
    }
    return f" {' '.join(word for word, holds in states.items() if holds)} "


# As `evaluations.latest`: on the task's own text, else the latest on any; one with a gain if there is one.
_GAIN = f"""
(SELECT retained_gain FROM evaluations AS own JOIN tasks AS same ON same.id = own.task_id
WHERE own.task_id = codes.task_id AND own.generator_id = codes.generator_id
    AND rung = CASE WHEN codes.residual_id IS NULL THEN {RUNGS.index("code")} ELSE {RUNGS.index("residual")} END
ORDER BY coalesce(data_id = same.eval_id, FALSE) DESC, retained_gain IS NOT NULL DESC, own.id DESC LIMIT 1)"""  # noqa: S608
_EXTRAS = """
(SELECT CAST(coalesce(sum(blobs.size), 0) AS BIGINT) FROM extras JOIN blobs ON blobs.id = extras.blob_id
WHERE extras.adapter_id = final.id)"""
_ERROR = "CASE WHEN codes.residual_id IS NULL THEN codes.dw_error ELSE codes.residual_error END"
_SIZES = ("final", "weights", "config", "card")
_STATES = ("evicted_at", "pinned", "codes.id", "description_id", "tasks.base_model_id", "is_generated")
_FIELDS = {
    "name": _Field(("tasks.name",), (), _text),
    "base": _Field(("tasks.base_model_id",), (), _base),
    "rank": _Field(("final.description_id",), ("final",), _rank),
    "size": _Field(("weights.size + config.size + coalesce(card.size, 0)",), _SIZES, _number),
    "code": _Field(("code.size + coalesce(residual.size, 0)",), ("codes", "code", "residual"), _number),
    "extras": _Field((_EXTRAS,), ("final",), _number),
    # Of what the task decodes to: code and residual, or the code.
    "gain": _Field((_GAIN,), ("codes",), _number),
    "error": _Field((_ERROR,), ("codes",), _root),
    "tag": _Field(("tags",), (), _words),
    "status": _Field(_STATES, ("final", "codes"), _status),
    "source": _Field(("coalesce(final.source, tasks.folder)",), ("final",), _text),
    "note": _Field(("note",), (), _text_or_empty),
}
