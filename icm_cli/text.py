"""Format codes, errors and base models for display."""

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
    from registry.manifests import Claim, Source


SOURCES: tuple[Source, ...] = ("base", "original", "code", "recalled", "network")
"""Sources of a task's adapter, in table order."""


def figure(value: float | None, digits: int = 4) -> str:
    """Return a number with a fixed number of decimals, or "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def path_shown(path: str) -> str:
    """Return a path relative to the current folder if it is inside, else unchanged."""
    return path.removeprefix(f"{os.getcwd()}{os.sep}")


def grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Group (reason, task) pairs by reason."""
    groups: dict[str, list[str]] = {}
    for reason, task in pairs:
        groups.setdefault(reason, []).append(task)
    return groups


def coded_size(code: int | None) -> str:
    """Return the size of a code, or "-" without one."""
    return "-" if code is None else human_size(code)


def errors_json(squared: float | None) -> dict[str, float | None]:
    """Return the JSON fields of an error: the relative error and its square."""
    return {"relative_error": relative_error(squared), "squared_error": squared}


def claim_text(claim: Claim) -> str:
    """Return the figures that a bundle claims for a code, such as "relative error 0.120, retained gain 0.951"."""
    error, gain = claim.relative_error, claim.retained_gain
    texts = [] if error is None else [f"relative error {error:.3f}"]
    return ", ".join(texts if gain is None else [*texts, f"retained gain {gain_text(gain, claim.precision)}"])


def claim_json(claim: Claim | None) -> dict[str, object] | None:
    """Return the JSON object of a claim."""
    if claim is None:
        return None
    return {
        **errors_json(claim.squared_error),
        "retained_gain": claim.retained_gain,
        "precision": claim.precision,
    }


def joined_text(event: BaseJoined) -> str:
    """Return a line that names an automatic alias, its reason and the command to undo it."""
    reason = "identical files" if event.reason == "fingerprint" else "a known mirror"
    reason += ", quantised" if event.is_quantised else ""
    undo = f"icm base alias {event.base_model} {event.label} --remove"
    return f"treating {event.label} as {event.base_model} ({reason}); run `{undo}` to undo this"


def groups_json(groups: Sequence[GroupError]) -> list[dict[str, object]]:
    """Return the relative errors of module groups for JSON. A non-finite error becomes null."""
    return [
        {**asdict(group), "errors": {name: error if isfinite(error) else None for name, error in group.errors.items()}}
        for group in groups
    ]


def as_fields(record: DataclassInstance, *left_out: str) -> dict[str, Any]:
    """Return the fields of a record for JSON, without some, and with the relative error next to each squared error."""

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            found |= errors_json(value) if name == "squared_error" else {name: value}
        return {name: value for name, value in found.items() if name not in left_out}

    return asdict(record, dict_factory=fields)
