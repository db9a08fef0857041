"""Say what a figure was measured of, and in how few bits its base model was loaded. Full precision goes unsaid."""

from __future__ import annotations

from collections.abc import Iterable

from registry.names import LOAD_IN


def source_name(rung: str) -> str:
    """Return what people call a source. Rows and JSON keep the older word, which `icm generate` has taken since."""
    return "recalled" if rung == "generate" else rung


def gain_text(gain: float | None, precision: str | None, digits: int = 3, missing: str = "-") -> str:
    """Return a retained gain such as "0.951", or "0.951 nf4"."""
    return missing if gain is None else f"{gain:.{digits}f}{f' {precision}' if precision in LOAD_IN else ''}"


def measured_in(precisions: Iterable[str | None]) -> str:
    """Return what to put behind figures that were measured in these precisions: all of them, if one is few bits."""
    found = sorted({precision for precision in precisions if precision is not None})
    return f" {', '.join(found)}" if any(precision in LOAD_IN for precision in found) else ""
