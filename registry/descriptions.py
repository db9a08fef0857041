"""What the adapters of a fleet have in common, kept once for all that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from registry.records import LayoutEntry, NewAdapter


class Description(NamedTuple):
    """An adapter without its weights; attributes as in :class:`registry.records.AdapterRecord`.

    As JSON it is an array, in this order.
    """

    dtype: str
    rank_max: int
    parameters: int
    target_modules: Sequence[str]
    layout: Sequence[LayoutEntry]


def description_of(new: NewAdapter) -> Description:
    """Return the description of a new adapter, in a form that can be a key."""
    return Description(new.dtype, new.rank_max, new.parameters, tuple(new.target_modules), tuple(new.layout))
