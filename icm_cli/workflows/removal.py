"""Forget tasks, and free the bytes that nothing needs any more."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from icm_cli.workflows.opening import Place
from registry.garbage import PruneReport
from registry.records import AdapterRecord


@dataclass(frozen=True)
class Doomed:
    """A task that is to be forgotten.

    Attributes:
        name: The task, as the store spells it.
        adapters: How many adapters it has.
        size: Bytes of their files; some may be shared with other tasks.
        is_last_copy: Whether its original was evicted, so that its code is all there is.
    """

    name: str
    adapters: int
    size: int
    is_last_copy: bool


def plan_removal(place: Place, names: Sequence[str]) -> list[Doomed]:
    """Return what forgetting some tasks would take away, each task once.

    Raises:
        TaskNotFound: One of them is not in the store.
    """
    with place.open(read_only=True) as store:
        tasks = {store.task(name).name: None for name in names}
        return [_doomed(name, store.adapters(name)) for name in tasks]


def remove_tasks(place: Place, names: Sequence[str], *, last_copies: Collection[str] = ()) -> list[str]:
    """Forget tasks and return their names; `prune_store` frees their bytes.

    Args:
        place: The store.
        names: The tasks.
        last_copies: Those of which the user knows that nothing brings them back.

    Raises:
        TaskNotFound: One of them is not there any more; nothing was changed.
        LastCopy: Another one was evicted meanwhile; nothing was changed.
    """
    with place.open() as store:
        return [task.name for task in store.remove_tasks(names, last_copies=last_copies)]


def prune_store(place: Place, *, grace: float, dry_run: bool) -> PruneReport:
    """Delete the bytes that no row needs.

    Args:
        place: The store.
        grace: Seconds; what is younger stays.
        dry_run: Only say what would go.
    """
    with place.open(read_only=dry_run) as store:
        return store.prune(grace=grace, dry_run=dry_run)


def _doomed(name: str, adapters: Sequence[AdapterRecord]) -> Doomed:
    size = sum(adapter.stored_bytes for adapter in adapters)
    return Doomed(name, len(adapters), size, any(adapter.is_final and adapter.is_evicted for adapter in adapters))
