"""Keep the originals of some tasks for good, or let them go again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from icm_cli.workflows.opening import Place


@dataclass(frozen=True)
class Pinned:
    """What was pinned or unpinned.

    Attributes:
        names: The tasks, as the store spells them.
        evicted: Those whose original is gone already.
    """

    names: list[str]
    evicted: list[str]


def set_pinned(place: Place, names: Sequence[str], *, pinned: bool) -> Pinned:
    """Pin some tasks, or unpin them.

    Raises:
        TaskNotFound: One of them is not in the store; nothing was changed.
    """
    with place.open() as store:
        done = store.set_pinned(names, pinned)
        return Pinned(done, [name for name in done if store.final_adapter(name).is_evicted])
