"""How codes, residuals, errors and base models are shown."""

from __future__ import annotations

import os
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING

from icmlora.fleet.measure.metric_result import gain_text, relative_error
from icmlora.io.text import human_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from _typeshed import DataclassInstance

    from icmlora.adapter.metrics import GroupError
    from icmlora.fleet.bases.joins import BaseJoined
    from icmlora.fleet.records import Claim, Rung


SOURCES: tuple[Rung, ...] = ("base", "original", "residual", "code", "generate", "network")
"""Sources of a task's adapter, as tables list them."""


def figure(value: float | None, digits: int = 4) -> str:
    """Return a number with so many digits after the point, or "-"."""
    return "-" if value is None else f"{value:.{digits}f}"


def path_shown(path: str) -> str:
    """Return a path as the user would write it: from the current folder where it is inside."""
    return path.removeprefix(f"{os.getcwd()}{os.sep}")


def grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the tasks of each reason, from pairs of a reason and a task."""
    groups: dict[str, list[str]] = {}
    for reason, task in pairs:
        groups.setdefault(reason, []).append(task)
    return groups


def coded_size(code: int | None, residual: int | None) -> str:
    """Return the size of a code, plus that of its residual if it has one."""
    if code is None:
        return "-"
    return human_size(code) if residual is None else f"{human_size(code)} + {human_size(residual)}"


def errors_json(squared: float | None) -> dict[str, float | None]:
    """Return an error as JSON gives it: the relative error, and its square."""
    return {"relative_error": relative_error(squared), "squared_error": squared}


def claim_text(claim: Claim) -> str:
    """Return what a bundle says of a code, such as "relative error 0.120, retained gain 0.951"."""
    error, gain = claim.relative_error, claim.retained_gain
    texts = [] if error is None else [f"relative error {error:.3f}"]
    return ", ".join(texts if gain is None else [*texts, f"retained gain {gain_text(gain, claim.precision)}"])


def claim_json(claim: Claim | None) -> dict[str, object] | None:
    """Return the same as JSON gives it."""
    if claim is None:
        return None
    return {
        **errors_json(claim.squared_error),
        "retained_gain": claim.retained_gain,
        "precision": claim.precision,
    }


def joined_text(event: BaseJoined) -> str:
    """Say that a label was taken for a base model, and how to undo it."""
    how = "their files are equal" if event.reason == "fingerprint" else "a known mirror"
    how += ", quantised" if event.is_quantised else ""
    undo = f"icm base alias {event.base_model} {event.label} --remove"
    return f"{event.label} is taken for {event.base_model} ({how}), which `{undo}` undoes"


def groups_json(groups: Sequence[GroupError]) -> list[dict[str, object]]:
    """Return the relative errors of groups of modules as JSON gives them; one that is not finite is null."""
    return [
        {**asdict(group), "errors": {name: error if isfinite(error) else None for name, error in group.errors.items()}}
        for group in groups
    ]


def as_fields(record: DataclassInstance) -> dict[str, Any]:
    """Return the fields of a record for JSON, each squared error with its root."""
    return asdict(record, dict_factory=_with_relative_error)


def _with_relative_error(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        fields |= errors_json(value) if name == "squared_error" else {name: value}
    return fields
