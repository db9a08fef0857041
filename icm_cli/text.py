"""How codes, what lies beside them, and what they were asked to keep are written for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from registry.records import Asked


def coded_size(code: int | None, residual: int | None) -> str:
    """Return the size of a code, with that of its residual if it has one."""
    if code is None:
        return "-"
    return human_size(code) if residual is None else f"{human_size(code)} + {human_size(residual)}"


def limits_text(asked: Asked) -> str:
    """Return what was asked for."""
    limits = (
        ("a retained gain of", asked.min_gain),
        ("a relative dW error of", asked.max_error),
        ("a weighted error of", asked.tolerance),
    )
    return " and ".join(f"{name} {limit:g}" for name, limit in limits if limit is not None)


def shortfalls(short: Iterable[Asked]) -> list[str]:
    """Say how many tasks keep their original for want of what they were asked to keep, a line for each limit."""
    found: dict[str, int] = {}
    for asked in short:
        text = limits_text(asked)
        found[text] = found.get(text, 0) + 1
    return [
        f"{counted(number, 'task')} {'keeps its' if number == 1 else 'keep their'} original: no code keeps {text}"
        for text, number in sorted(found.items())
    ]
