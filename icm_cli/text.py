"""How codes, residuals, errors and limits are shown."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from icmlora.fleet.metric_result import relative_error
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from _typeshed import DataclassInstance

    from icmlora.fleet.records import Asked


def coded_size(code: int | None, residual: int | None) -> str:
    """Return the size of a code, plus that of its residual if it has one."""
    if code is None:
        return "-"
    return human_size(code) if residual is None else f"{human_size(code)} + {human_size(residual)}"


def errors_json(squared: float | None) -> dict[str, float | None]:
    """Return an error as JSON gives it: the relative error, and its square."""
    return {"relative_error": relative_error(squared), "squared_error": squared}


def as_fields(record: DataclassInstance) -> dict[str, Any]:
    """Return the fields of a record for JSON, each squared error with its root."""
    return asdict(record, dict_factory=_with_relative_error)


def _with_relative_error(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        fields |= errors_json(value) if name == "squared_error" else {name: value}
    return fields


def limits_text(asked: Asked) -> str:
    """Return the limits that a code was made for."""
    limits = (
        ("retained gain at least", asked.min_gain),
        ("relative error at most", asked.max_error),
        ("weighted error at most", asked.tolerance),
    )
    return " and ".join(f"{name} {limit:g}" for name, limit in limits if limit is not None)


def shortfalls(short: Iterable[Asked]) -> list[str]:
    """Say how many tasks keep their original because no code meets their limit, one line per limit."""
    return [
        f"{counted(number, 'task')} {'keeps its' if number == 1 else 'keep their'} original: no code meets {text}"
        for text, number in sorted(Counter(map(limits_text, short)).items())
    ]
