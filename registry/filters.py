"""Filters and orders of tasks: `rank>=8`, `tag=prod`, `base~llama`; sorted by `size:desc`.

A filter is FIELD OPERATOR VALUE. Case does not matter in any text. A task without a value (no code, so no gain) passes
no filter on it but `!=`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from registry.errors import InvalidFilter
from registry.names import escape, is_text

Operator = Literal["=", "!=", "<", "<=", ">", ">=", "~"]
Kind = Literal["text", "words", "number", "size"]

STATUSES = ("evicted", "pinned", "coded", "original-only", "does-nothing", "generated")


@dataclass(frozen=True)
class FilterField:
    """A property that tasks are filtered and sorted by."""

    name: str
    kind: Kind
    meaning: str
    choices: tuple[str, ...] = ()  # all words there are; empty for any

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The operators that it can be compared with."""
        return ("=", "!=", "~") if self.kind in ("text", "words") else ("=", "!=", ">", ">=", "<", "<=")

    @property
    def can_be_sorted(self) -> bool:
        """Whether a task has a single value of it."""
        return self.kind != "words"


FIELDS = {
    field.name: field
    for field in (
        FilterField("name", "text", "the task"),
        FilterField("base", "text", "its base model, by any of its names"),
        FilterField("rank", "number", "the largest rank"),
        FilterField("size", "size", "the size of the original, such as 10MB or 512KiB"),
        FilterField("code", "size", "the size of the code"),
        FilterField("extras", "size", "the size of the tensors and files stored next to the code"),
        FilterField("gain", "number", "the retained gain of the code"),
        FilterField("error", "number", "the relative error, ||dW' - dW|| / ||dW||"),
        FilterField("tag", "words", "its tags"),
        FilterField("status", "words", ", ".join(STATUSES), STATUSES),
        FilterField("source", "text", "the folder it was ingested from"),
        FilterField("note", "text", "its note"),
    )
}


@dataclass(frozen=True)
class Filter:
    """A condition on one field."""

    field: FilterField
    operator: Operator
    value: str | float  # text is in lower case


@dataclass(frozen=True)
class Sort:
    """An order by one field; tasks without a value come last."""

    field: FilterField
    descending: bool = False


@dataclass(frozen=True)
class Selection:
    """Filters, an order, and a maximum number of tasks."""

    base_model: str | None = None
    filters: Sequence[Filter] = ()  # all of them must hold
    sort: Sort | None = None  # by name if there is none
    limit: int | None = None
    endings: Sequence[str] = ()  # if there are any, the name ends with one of these, in lower case


_FILTER = re.compile(r"\s*([\w-]*)\s*(!=|>=|<=|==|=|>|<|~)(.*)", re.DOTALL)
# At most the digits that a float holds; no float is infinite.
_NUMBER = re.compile(r"[+-]?(?:\d{1,15}(?:\.\d{0,15})?|\.\d{1,15})(?:e[+-]?\d{1,2})?", re.IGNORECASE | re.ASCII)
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([kmgtp]?)(i?)(b?)", re.IGNORECASE | re.ASCII)
_PREFIXES = "kmgtp"


def parse_filter(text: str) -> Filter:
    """Read a filter such as `rank>=8`; raise `InvalidFilter` with a hint."""
    found = _FILTER.fullmatch(text)
    if found is None or not found[1]:
        hint = f"write FIELD OPERATOR VALUE, such as 'rank>=8' or 'tag=prod'; {_known()}"
        raise InvalidFilter(f"{escape(text, 80)!r} is not a filter", hint=hint)
    field, value = field_of(found[1]), found[3].strip()
    operator = cast(Operator, "=" if found[2] == "==" else found[2])
    if operator not in field.operators:
        hint = f"{field.name} takes {' '.join(field.operators)}"
        raise InvalidFilter(f"{field.name} cannot be compared with {operator}", hint=hint)
    return Filter(field, operator, _value(field, operator, value))


def parse_sort(text: str) -> Sort:
    """Read an order such as `size:desc`; raise `InvalidFilter` if it is none."""
    name, colon, way = text.partition(":")
    if colon and way.strip().lower() not in ("asc", "desc"):
        raise InvalidFilter(f"{escape(way, 40)!r} is not a sort order", hint="write FIELD:asc or FIELD:desc")
    field = field_of(name.strip())
    if not field.can_be_sorted:
        fields = ", ".join(field.name for field in FIELDS.values() if field.can_be_sorted)
        raise InvalidFilter(f"tasks cannot be sorted by {field.name}", hint=f"sort by one of: {fields}")
    return Sort(field, way.strip().lower() == "desc")


def field_of(name: str) -> FilterField:
    """Return a field by name, in any case; raise `InvalidFilter` if there is none."""
    field = FIELDS.get(name.lower())
    if field is None:
        close = difflib.get_close_matches(name.lower(), FIELDS, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise InvalidFilter(f"there is no field {escape(name, 40)!r}", hint=f"{guess}{_known()}")
    return field


def parse_size(text: str) -> float | None:
    """Read a number of bytes: `1500`, `10MB` (10,000,000), `10MiB` or `10M` (10,485,760); None if it is not one."""
    found = _SIZE.fullmatch(text)
    if found is None or (found[3] and not found[2]):
        return None
    power = _PREFIXES.index(found[2].lower()) + 1 if found[2] else 0
    is_decimal = bool(found[4]) and not found[3]
    return float(found[1]) * float((1000 if is_decimal else 1024) ** power)


def _value(field: FilterField, operator: Operator, value: str) -> str | float:
    match field.kind:
        case "number":
            if not _NUMBER.fullmatch(value):
                raise InvalidFilter(f"{escape(value, 40)!r} is not a number", hint=f"{field.name} is {field.meaning}")
            return float(value)
        case "size":
            if (size := parse_size(value)) is None:
                raise InvalidFilter(f"{escape(value, 40)!r} is not a size", hint="write 1500, 10MB, 10MiB or 10M")
            return size
        case "text":
            if not is_text(value):
                raise InvalidFilter(f"{escape(value, 40)!r} is not text", hint=None)
        case "words":
            _check_word(field, operator, value)
    return value.lower()


def _check_word(field: FilterField, operator: Operator, value: str) -> None:
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        example = field.choices[0] if field.choices else "prod"
        raise InvalidFilter(
            f"{escape(value, 40)!r} is not a valid {field.name}",
            hint=f"write a single word, such as '{field.name}={example}'",
        )
    if field.choices and operator != "~" and value.lower() not in field.choices:
        hint = f"use one of {', '.join(field.choices)}"
        raise InvalidFilter(f"{escape(value, 40)!r} is not a valid {field.name}", hint=hint)


def _known() -> str:
    return f"fields: {', '.join(FIELDS)}"
