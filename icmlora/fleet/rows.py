"""Facts that the row of a task holds as text. A text that cannot be read counts as none: `icm verify` reports it."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from registry.encoding import read
from registry.manifests import Claim, CodeLimits, Part
from registry.names import is_bundle_source

if TYPE_CHECKING:
    from registry.tables import TaskRow

P = TypeVar("P", bound=Part)


def limits_of(row: TaskRow) -> CodeLimits | None:
    """Return the limits that a task's code was made for."""
    return _read(CodeLimits, row.limits)


def claim_of(row: TaskRow) -> Claim | None:
    """Return the quality that a bundle states for a task's code."""
    return _read(Claim, row.claim)


def was_never_here(row: TaskRow) -> bool:
    """Return whether a bundle brought the code of a task without its original."""
    return row.evicted_at is not None and is_bundle_source(row.source)


@lru_cache(maxsize=256)  # most tasks have the same limits
def _read(kind: type[P], text: str | None) -> P | None:
    try:
        return None if text is None else read(kind, json.loads(text))
    except (ValueError, TypeError):
        return None
