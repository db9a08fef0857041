"""Write codes, residuals and limits for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from icmlora.fleet.records import Asked


def coded_size(code: int | None, residual: int | None) -> str:
    """Return the size of a code, plus that of its residual if it has one."""
    if code is None:
        return "-"
    return human_size(code) if residual is None else f"{human_size(code)} + {human_size(residual)}"


def limits_text(asked: Asked) -> str:
    """Return the limits that a code was made for."""
    limits = (
        ("retained gain at least", asked.min_gain),
        ("relative dW error at most", asked.max_error),
        ("weighted error at most", asked.tolerance),
    )
    return " and ".join(f"{name} {limit:g}" for name, limit in limits if limit is not None)


def shortfalls(short: Iterable[Asked]) -> list[str]:
    """Say how many tasks keep their original because no code meets their limit, one line per limit."""
    return [
        f"{counted(number, 'task')} {'keeps its' if number == 1 else 'keep their'} original: no code meets {text}"
        for text, number in sorted(Counter(map(limits_text, short)).items())
    ]
